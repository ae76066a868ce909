"""The record of the client's methods and commands, made by running them, is what they do now.

MEGATRAIN_WRITE_SDK_TABLE=1 writes it again.
"""

import json
import os
import warnings

import pytest
import tinker

from tests.service.recipes import Recipes, recipe_server
from tests.service.sdk_table import (
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
    pytest.mark.chaos,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    server = recipe_server(folder / "service")
    server.start()
    recipes = Recipes(server, folder / "work")
    recipes.folder.mkdir()
    recipes.prepare()
    yield recipes
    assert server.stop() == 0


def check(kind: str, found: dict[str, str]) -> None:
    """Compare with the record, or write it."""
    if os.environ.get("MEGATRAIN_WRITE_SDK_TABLE"):
        record = read_record() | {kind: found}
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        RECORD.with_suffix(".md").write_text("\n".join(map(markdown, record.values())))
    # Reasons may be said in other words; what works must work.
    shown = {name: outcome.split(":")[0] for name, outcome in found.items()}
    expected = {name: outcome.split(":")[0] for name, outcome in read_record()[kind].items()}
    assert shown == expected, found


def test_every_public_method_has_a_call():
    assert [each for each in public_methods() if arguments_of(each) is None] == []


@pytest.mark.chaos
def test_every_method_and_command_is_in_the_record():
    record = read_record()
    assert sorted(record["methods"]) == sorted(public_methods())
    assert sorted(record["commands"]) == sorted(command_names())


@pytest.mark.chaos
def test_the_table_says_what_the_record_says():
    shown = RECORD.with_suffix(".md").read_text()
    for name, outcome in (read_record()["methods"] | read_record()["commands"]).items():
        assert f"`{name.removesuffix('_async')}`" in shown
        assert outcome in shown


class TestLive:
    pytestmark = live

    def test_all_methods_do_what_the_record_says(self, recipes, monkeypatch):
        monkeypatch.chdir(recipes.folder)  # the tokenizer is found there by its name
        _use(recipes, monkeypatch)
        warnings.simplefilter("ignore")
        check("methods", run_table(tinker.ServiceClient, public_methods()))

    def test_all_commands_do_what_the_record_says(self, recipes, monkeypatch):
        _use(recipes, monkeypatch)
        check("commands", run_commands(recipes))


def _use(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", recipes.server.key)
    monkeypatch.setenv("TINKER_BASE_URL", recipes.server.url)
    monkeypatch.setenv("TINKER_PROJECT_ID", "default")  # where a client copies weights to
