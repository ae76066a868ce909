"""Fingerprints: equal for equal steps in any process, different for anything that counts."""

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

import megatrain.data.fingerprint as fingerprint_module
from megatrain.cli.quickstart.tokenizer import build_tokenizer
from megatrain.data.dataset import Dataset
from megatrain.data.fingerprint import fingerprint
from megatrain.data.template.base import Template


class Step:
    """Adds a number."""

    def __init__(self, amount: int, names: frozenset[str] = frozenset({"a", "b", "c"})) -> None:
        self.amount, self.names = amount, names

    def __call__(self, row: dict[str, int]) -> int:
        return row["n"] + self.amount


def add(row: dict[str, int], amount: int) -> int:
    return row["n"] + amount


def adder(amount: int) -> Callable[[dict[str, int]], int]:
    return lambda row: row["n"] + amount


def templates() -> list[Any]:
    """Templates that encode differently."""
    tokenizer = build_tokenizer(["one two three"], vocab_size=280)
    other = build_tokenizer(["four five six seven"], vocab_size=280)
    return [
        Template(tokenizer=tokenizer),
        Template(tokenizer=other),
        Template(tokenizer=tokenizer, max_length=20),
        Template(tokenizer=tokenizer, loss_on="all"),
        Template(tokenizer=tokenizer, chat_template="{{ messages[0].content }}"),
    ]


def test_equal_steps_have_equal_fingerprints() -> None:
    for one, other in (
        (Step(1), Step(1)),
        (adder(1), adder(1)),
        (functools.partial(add, amount=1), functools.partial(add, amount=1)),
        *zip(templates(), templates(), strict=True),
    ):
        assert fingerprint(one) == fingerprint(other)


def test_what_counts_changes_the_fingerprint() -> None:
    steps = [
        Step,
        Step(1),
        Step(2),
        Step(1, frozenset({"a"})),
        adder(1),
        adder(2),
        add,
        functools.partial(add, amount=1),
        functools.partial(add, amount=2),
        Step(1).__call__,
        Step(2).__call__,
        *templates(),
    ]
    assert len({fingerprint(step) for step in steps}) == len(steps)


def test_use_of_a_tokenizer_does_not_change_it() -> None:
    template = templates()[0]
    before = fingerprint(template)
    template.tokenizer(["one", "two three"], truncation=True, max_length=2, padding=True)
    template.encode(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    assert fingerprint(template) == before


def test_it_is_the_same_in_another_process() -> None:
    code = (
        "from tests.unit.data.test_fingerprint import *; print(fingerprint(Step(1), templates()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == fingerprint(Step(1), templates())


MODULE = """
from {package} import suffix
def helper(x): return x + suffix.SUFFIX + "{constant}"
class Step:
    def __call__(self, row): return {{"n": helper(row["n"])}}
def step(row): return {{"n": helper(row["n"])}} if row["n"] in {{"a", "b", "c", "n"}} else None
"""
SCRIPT = """
import logging
from megatrain.data.dataset import Dataset
from megatrain.data.dataset import Dataset
from megatrain.data.fingerprint import fingerprint
from own_steps import code
WORDS = {{"a", "b", "c", "{word}"}}
def helper(row): return row["n"] in WORDS and row["n"] in {{"x", "y", "z", "n"}}
def keep(row): return helper(row)
class Keep:
    def __call__(self, row): return helper(row)
print(fingerprint(keep), fingerprint(Keep()), fingerprint(code.step), fingerprint(code.Step()))
"""


def write_steps(folder: Path, *, constant: str = "1", suffix: str = "2", word: str = "n") -> None:
    package = folder / "own_steps"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "suffix.py").write_text(f"SUFFIX = '{suffix}'\n")
    (package / "code.py").write_text(MODULE.format(package="own_steps", constant=constant))
    (folder / "script.py").write_text(SCRIPT.format(word=word))


def run_script(folder: Path, seed: int = 0) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-B", "script.py"],
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.split()


@pytest.mark.slow
def test_code_that_a_step_calls_counts_and_the_order_of_sets_does_not(tmp_path: Path) -> None:
    write_steps(tmp_path)
    keep, keep_class, step, step_class = first = run_script(tmp_path)
    assert len(set(first)) == 4
    assert run_script(tmp_path, seed=1) == first
    write_steps(tmp_path, word="other")
    changed = run_script(tmp_path)
    assert changed[2:] == [step, step_class]
    assert not {keep, keep_class} & set(changed)
    for options in ({"constant": "3"}, {"suffix": "4"}):
        write_steps(tmp_path, **options)
        changed = run_script(tmp_path)
        assert changed[:2] == [keep, keep_class]
        assert not {step, step_class} & set(changed)


def test_a_module_that_is_loaded_again_gives_new_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_steps", "own_steps.code", "own_steps.suffix"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "rows.jsonl").write_text('{"n": "n"}\n')

    def rows(name: str) -> Any:
        step = getattr(importlib.import_module("own_steps.code"), name)
        return list(Dataset(tmp_path / "rows.jsonl").map(step() if name == "Step" else step))

    write_steps(tmp_path)
    assert rows("Step") == rows("step") == [{"n": "n21"}]
    write_steps(tmp_path, constant="another")
    importlib.reload(sys.modules["own_steps.code"])
    assert rows("Step") == rows("step") == [{"n": "n2another"}]


def test_this_package_s_code_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint("map")
    monkeypatch.setattr(fingerprint_module, "_own_code", lambda: "other code")
    assert fingerprint("map") != before
