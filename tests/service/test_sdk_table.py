"""The record of the client's methods and commands, made by running them, is what they do now.

MEGATRAIN_WRITE_SDK_TABLE=1 writes it again.
"""

import json
import os
import warnings

import pytest
import tinker

from tests.service.recipes import Recipes, live_recipes
from tests.service.sdk_table import (
    IN_README,
    README,
    RECORD,
    arguments_of,
    markdown,
    public_methods,
    read_record,
    run_table,
)
from tests.service.tinker_commands import command_names, run_commands

live = [
    pytest.mark.multiprocess,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    with live_recipes(tmp_path_factory.mktemp("table")) as recipes:
        yield recipes


def check(kind: str, found: dict[str, str]) -> None:
    """Compare with the record, or write it."""
    if os.environ.get("MEGATRAIN_WRITE_SDK_TABLE"):
        record = read_record() | {kind: found}
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    # Reasons may be said in other words; what works must work.
    shown = {name: outcome.split(":")[0] for name, outcome in found.items()}
    expected = {name: outcome.split(":")[0] for name, outcome in read_record()[kind].items()}
    assert shown == expected, found


def test_every_public_method_has_a_call():
    assert [each for each in public_methods() if arguments_of(each) is None] == []


def test_every_method_and_command_is_in_the_record():
    record = read_record()
    assert sorted(record["methods"]) == sorted(public_methods())
    assert sorted(record["commands"]) == sorted(command_names())


def test_readme_has_the_table_of_the_record():
    (table,) = IN_README.findall(README.read_text())
    assert table == markdown(read_record())


def test_twins_of_one_outcome_are_one_name():
    methods = {"A.run": "works", "A.run_async": "works", "A.end": "works", "A.end_async": "no: 1"}
    table = markdown({"methods": methods, "commands": {"run list": "refused: E: why"}})
    assert table.splitlines()[2:] == [
        "| `A` | `end` `run[_async]` | `end_async`: no: 1 |",
        "| `tinker run` |  | `list`: E: why |",
        "",
        "3 of 4 methods and 0 of 1 commands work.",
    ]


class TestLive:
    pytestmark = live

    @pytest.mark.slow
    def test_all_methods_do_what_the_record_says(self, recipes, monkeypatch):
        monkeypatch.chdir(recipes.folder)  # the tokenizer is found there by its name
        _use(recipes, monkeypatch)
        warnings.simplefilter("ignore")
        check("methods", run_table(tinker.ServiceClient, public_methods()))

    @pytest.mark.chaos
    def test_all_commands_do_what_the_record_says(self, recipes, monkeypatch):
        _use(recipes, monkeypatch)
        check("commands", run_commands(recipes))


def _use(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", recipes.server.key)
    monkeypatch.setenv("TINKER_BASE_URL", recipes.server.url)
    monkeypatch.setenv("TINKER_PROJECT_ID", "default")  # where a client copies weights to
