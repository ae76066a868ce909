"""Fingerprints: equal for equal steps in any process, different for anything that counts."""

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from megatrain.cli.quickstart.tokenizer import build_tokenizer
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
