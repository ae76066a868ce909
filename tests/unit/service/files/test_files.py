"""Folders are put whole or not at all, come out as they went in, and stay in their place."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.service.files import files as module
from megatrain.service.files.files import MANIFEST, Files

KEY = "run_train_0/weights/one"


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where files are kept: a folder, and fsspec's memory, which stands for an object store."""
    if request.param == "folder":
        return str(tmp_path / "files")
    return f"memory://{tmp_path.name}"


def made(folder: Path, text: str = "weights", **more: str) -> Path:
    """Return a new folder with files in it."""
    (folder / "deep").mkdir(parents=True)
    (folder / "adapter.safetensors").write_text(text)
    (folder / "deep" / "state.json").write_text("{}")
    for name, content in more.items():
        (folder / name).write_text(content)
    return folder


def names(folder: Path) -> dict[str, str]:
    """Return what a folder holds, without the manifest."""
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in folder.rglob("*")
        if file.is_file() and file.name != MANIFEST
    }


def run(url: str, folder: Path, check: Callable[[Files], Coroutine[Any, Any, None]]) -> None:
    async def opened() -> None:
        await check(await Files.open(url, folder / "data"))

    asyncio.run(opened())


def test_a_folder_comes_out_as_it_went_in(url: str, tmp_path: Path) -> None:
    async def check(files: Files) -> None:
        size = await files.put_folder(KEY, made(tmp_path / "in"))
        assert size == len("weights") + len("{}")
        folder = await files.local_folder(KEY)
        assert names(folder) == {"adapter.safetensors": "weights", "deep/state.json": "{}"}
        assert sorted(await files.manifest(KEY)) == ["adapter.safetensors", "deep/state.json"]

    run(url, tmp_path, check)


def test_a_second_folder_takes_the_place_of_the_first_wholly(url: str, tmp_path: Path) -> None:
    async def check(files: Files) -> None:
        await files.put_folder(KEY, made(tmp_path / "in", extra="old"))
        await files.local_folder(KEY)
        await files.put_folder(KEY, made(tmp_path / "again", "newer"))
        found = names(await files.local_folder(KEY))
        assert found == {"adapter.safetensors": "newer", "deep/state.json": "{}"}

    run(url, tmp_path, check)


def test_deleted_files_are_gone_and_deleting_them_again_is_no_error(
    url: str, tmp_path: Path
) -> None:
    async def check(files: Files) -> None:
        await files.put_folder(KEY, made(tmp_path / "in"))
        await files.delete(KEY)
        await files.delete(KEY)
        with pytest.raises(CheckpointError, match="not there"):
            await files.local_folder(KEY)

    run(url, tmp_path, check)


def test_a_file_is_read_in_pieces(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 3)

    async def check(files: Files) -> None:
        await files.put_folder(KEY, made(tmp_path / "in"))
        pieces, start = [], 0
        while piece := await files.read(KEY, "adapter.safetensors", start):
            pieces.append(piece)
            start += len(piece)
        assert pieces == [b"wei", b"ght", b"s"]
        with pytest.raises(CheckpointError, match="no file"):
            await files.read(KEY, "../one/adapter.safetensors", 0)

    run(url, tmp_path, check)


def test_without_a_manifest_there_is_nothing(url: str, tmp_path: Path) -> None:
    async def check(files: Files) -> None:
        await files.put_folder(KEY, made(tmp_path / "in"))
        system, root = fsspec.core.url_to_fs(url)
        system.rm_file(f"{root}/{KEY}/{MANIFEST}")
        with pytest.raises(CheckpointError, match="not whole"):
            await files.local_folder(KEY)

    run(url, tmp_path, check)


@pytest.mark.parametrize(("content", "word"), [(b"weightS", "altered"), (b"weigh", "cut short")])
def test_files_that_were_altered_are_refused(
    url: str, tmp_path: Path, content: bytes, word: str
) -> None:
    async def check(files: Files) -> None:
        await files.put_folder(KEY, made(tmp_path / "in"))
        system, root = fsspec.core.url_to_fs(url)
        system.pipe_file(f"{root}/{KEY}/adapter.safetensors", content)
        with pytest.raises(CheckpointError, match=word):
            await files.local_folder(KEY)

    run(url, tmp_path, check)


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/../../evil", "", MANIFEST, "a\\b"])
def test_a_manifest_that_points_outside_is_refused(url: str, tmp_path: Path, name: str) -> None:
    async def check(files: Files) -> None:
        await files.put_folder(KEY, made(tmp_path / "in"))
        system, root = fsspec.core.url_to_fs(url)
        text = json.dumps({name: {"size": 1, "sha256": "0"}})
        system.pipe_file(f"{root}/{KEY}/{MANIFEST}", text.encode())
        for attempt in (files.local_folder(KEY), files.read(KEY, name, 0)):
            with pytest.raises(CheckpointError, match="not whole"):
                await attempt

    run(url, tmp_path, check)


def test_a_link_in_a_folder_is_not_followed(url: str, tmp_path: Path) -> None:
    async def check(files: Files) -> None:
        folder = made(tmp_path / "in")
        (folder / "passwd").symlink_to("/etc/passwd")
        await files.put_folder(KEY, folder)
        assert "passwd" not in await files.manifest(KEY)

    run(url, tmp_path, check)


def test_a_process_killed_between_two_renames_leaves_the_folder_before(tmp_path: Path) -> None:
    async def check(files: Files) -> None:
        await files.put_folder(KEY, made(tmp_path / "in", "before"))
        target = tmp_path / "files" / KEY
        target.rename(target.with_name(f".{target.name}.old"))
        assert names(await files.local_folder(KEY))["adapter.safetensors"] == "before"
        await files.put_folder(KEY, made(tmp_path / "again", "after"))
        assert names(await files.local_folder(KEY))["adapter.safetensors"] == "after"
        assert [each.name for each in target.parent.iterdir()] == [target.name]

    run(str(tmp_path / "files"), tmp_path, check)


def test_what_a_killed_process_was_putting_is_cleared_away(tmp_path: Path) -> None:
    leftover = tmp_path / "files" / ".partial" / "half"
    leftover.mkdir(parents=True)

    async def check(files: Files) -> None:
        assert not leftover.exists()

    run(str(tmp_path / "files"), tmp_path, check)


def test_of_a_folder_the_real_one_is_given_and_of_others_one_copy(tmp_path: Path) -> None:
    async def real(files: Files) -> None:
        await files.put_folder(KEY, made(tmp_path / "in"))
        assert await files.local_folder(KEY) == tmp_path / "files" / KEY

    async def copy(files: Files) -> None:
        await files.put_folder(KEY, made(tmp_path / "in2"))
        found = await asyncio.gather(*(files.local_folder(KEY) for _ in range(4)))
        assert len(set(found)) == 1
        assert [each.name for each in files.scratch.iterdir()] == [found[0].name]

    run(str(tmp_path / "files"), tmp_path, real)
    run(f"memory://{tmp_path.name}", tmp_path, copy)


def test_a_copy_is_there_after_a_restart_and_half_a_one_is_not(tmp_path: Path) -> None:
    found: list[Path] = []

    async def before(files: Files) -> None:
        await files.put_folder(KEY, made(tmp_path / "in"))
        found.append(await files.local_folder(KEY))
        (files.scratch / "fetched-half.new").mkdir()
        (files.scratch / "other").mkdir()

    async def after(files: Files) -> None:
        assert list(files.scratch.iterdir()) == found
        assert names(found[0])["adapter.safetensors"] == "weights"

    run(f"memory://{tmp_path.name}", tmp_path, before)
    run(f"memory://{tmp_path.name}", tmp_path, after)


def test_copies_that_nobody_uses_are_deleted(tmp_path: Path) -> None:
    async def check(files: Files) -> None:
        for name in ("a", "b"):
            await files.put_folder(name, made(tmp_path / f"in-{name}", name))
        old = await files.local_folder("a")
        os.utime(old, (time.time() - module.COPY_S - 1,) * 2)
        await files.local_folder("b")
        assert not old.exists()
        assert names(await files.local_folder("a"))["adapter.safetensors"] == "a"

    run(f"memory://{tmp_path.name}", tmp_path, check)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (f"{tmp_path}/file/below", "nosuchprotocol://bucket"):
        with pytest.raises(ConfigError, match="cannot be kept"):
            asyncio.run(Files.open(place, tmp_path / "data"))


BAD = [
    "",
    ".",
    "..",
    "a/..",
    "../a",
    "/a",
    "a//b",
    ".hidden",
    "-x",
    "a\0",
    "a\n",
    "ä",
    "a:b",
    "a b",
]


@pytest.mark.parametrize("key", [*BAD, "a" * 201, "a\\..\\b", "a..b", "%2e%2e"])
def test_a_key_that_is_no_plain_name_is_refused_everywhere(tmp_path: Path, key: str) -> None:
    async def check(files: Files) -> None:
        folder = made(tmp_path / "in")
        for attempt in (
            files.put_folder(key, folder),
            files.manifest(key),
            files.local_folder(key),
            files.delete(key),
            files.read(key, "x", 0),
        ):
            with pytest.raises(DataError, match="a name must be"):
                await attempt
        assert folder.exists()

    run(str(tmp_path / "files"), tmp_path, check)


@given(st.text(alphabet=st.sampled_from("ab./\\-_:~%\0\n "), max_size=12) | st.text(max_size=20))
def test_no_key_leads_out_of_the_place(key: str) -> None:
    files = Files(fsspec.filesystem("file"), "/srv/files", Path("/srv/scratch"))
    try:
        path = files._path(key)
    except DataError:
        return
    inside = os.path.normpath(path)
    assert inside == path
    assert inside.startswith("/srv/files/")
