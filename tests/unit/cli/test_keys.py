"""`megatrain keys`: a key is shown once, works, and is ended."""

import asyncio
import re
from pathlib import Path

import pytest

from megatrain.cli import main
from megatrain.cli.keys import seconds_of
from megatrain.config.service import ServedModel, ServiceConfig
from megatrain.errors import ConfigError, DeniedError
from megatrain.service.auth.authenticate import Authenticator
from megatrain.service.auth.principal import Principal
from megatrain.service.store.store import Store

CONFIG = ServiceConfig(models=(ServedModel(name="base", path="/nowhere"),))


def keys(folder: Path, *arguments: str) -> int:
    return main(["keys", "--data", str(folder / "data"), *arguments])


def who(folder: Path, key: str) -> Principal:
    """Return who a key is for the service on the same folder."""

    async def ask() -> Principal:
        store = await Store.open(f"sqlite:///{folder / 'data' / 'service.db'}")
        try:
            return await Authenticator(store, CONFIG).authenticate({"x-api-key": key}, "read")
        finally:
            await store.close()

    return asyncio.run(ask())


def test_a_key_that_was_made_works_until_it_is_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ("create", "--project", "alice", "--name", "laptop", "--scopes", "train, sample")
    assert keys(tmp_path, *made) == 0
    key = capsys.readouterr().out.strip()
    assert re.fullmatch(r"tml-[A-Za-z0-9_-]{43}", key)
    found = who(tmp_path, key)
    assert (found.project, found.name, found.scopes) == ("alice", "laptop", {"train", "sample"})

    assert keys(tmp_path, "list") == 0
    listed = capsys.readouterr().out
    assert key not in listed
    assert re.match(rf"1\t{key[:8]}\.\.\.\talice\tlaptop\ttrain,sample\tvalid\n", listed)

    assert keys(tmp_path, "revoke", "1") == 0
    with pytest.raises(DeniedError, match="revoked"):
        who(tmp_path, key)
    keys(tmp_path, "list")
    assert capsys.readouterr().out.endswith("\trevoked\n")


def test_a_key_may_have_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys(tmp_path, "create", "--expires", "30d") == 0
    assert who(tmp_path, capsys.readouterr().out.strip()).project == "default"
    assert [seconds_of(text) for text in ("2h", "30d", "1w")] == [7200.0, 2592000.0, 604800.0]
    for text in ("", "d", "0d", "-1d", "3", "3y", "1.5d", "\u00b2d"):
        with pytest.raises(ConfigError, match="a time must be"):
            seconds_of(text)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("create", "--scopes", "everything"), "unknown scopes"),
        (("create", "--scopes", ""), "at least one scope"),
        (("create", "--expires", "soon"), "a time must be"),
        (("create", "--project", "a\tb"), "a project"),
        (("create", "--project", "p" * 65), "a project"),
        (("create", "--name", "two\nlines"), "a name"),
        (("revoke", "7"), "there is no key 7"),
    ],
)
def test_a_mistake_is_one_line_and_makes_no_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], word: str
) -> None:
    assert keys(tmp_path, *arguments) == 1
    assert word in capsys.readouterr().err
    keys(tmp_path, "list")
    assert capsys.readouterr().out == ""
