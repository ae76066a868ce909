"""Places that are not folders of this machine: URLs through fsspec, hubs through their packages."""

import errno
import importlib

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatrain.checkpoint import locate as locate_module
from megatrain.checkpoint.open import open_checkpoint
from megatrain.checkpoint.remote import local_source, local_target
from megatrain.errors import CheckpointError

FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def files():
    """Give fsspec's memory file system, and leave it empty."""
    found = fsspec.filesystem("memory")
    yield found
    for path in found.ls("/", detail=False):
        found.rm(path, recursive=True)


def write(folder):
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(name)


def names(files, path):
    return sorted(each.rpartition("/")[2] for each in files.find(path))


def test_a_result_is_copied_to_its_url_when_it_is_whole(files):
    with local_target("memory://out/model") as target:
        write(target)
        assert not files.exists("/out/model")
    assert names(files, "/out/model") == sorted(FILES)
    with local_source("memory://out/model") as source:
        assert sorted(path.name for path in source.iterdir()) == sorted(FILES)


class Failing(MemoryFileSystem):
    """Takes one file and no more; may keep what it has, too."""

    protocol = "failing"
    keeps = False

    def put_file(self, lpath, rpath, **options):
        if self.store:
            raise OSError(errno.EIO, "connection lost")
        super().put_file(lpath, rpath, **options)

    def rm(self, path, recursive=False, maxdepth=None):
        if self.keeps:
            raise PermissionError("no deleting here")
        super().rm(path, recursive, maxdepth)


@pytest.fixture
def failing(monkeypatch):
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(Failing, "store", {})
    monkeypatch.setattr(Failing, "pseudo_dirs", [""])
    return fsspec.filesystem("failing")


def test_a_copy_that_fails_leaves_nothing_and_can_be_tried_again(failing):
    for _ in range(2):  # the second is not refused for what the first left
        with (
            pytest.raises(
                CheckpointError,
                match=r"to failing://out/model: OSError.*connection lost\n.*nothing is left there",
            ),
            local_target("failing://out/model") as target,
        ):
            write(target)
        assert not failing.exists("/out/model")
        assert failing.store == {}


def test_a_copy_that_fails_and_cannot_be_removed_is_said_to_be_there(failing, monkeypatch):
    monkeypatch.setattr(Failing, "keeps", True)
    with (
        pytest.raises(CheckpointError, match=r"connection lost\n.*no deleting here.*remove it"),
        local_target("failing://out/model") as target,
    ):
        write(target)


class Hub:
    """Stands for huggingface_hub: a repository of these files, downloaded by pattern."""

    def __init__(self, folder, files):
        self.folder, self.files, self.asked = folder, files, []

    def snapshot_download(self, repository, *, allow_patterns):
        self.asked.append((repository, allow_patterns))
        for name, content in self.files.items():
            if any(locate_module.Path(name).match(pattern) for pattern in allow_patterns):
                (self.folder / name).write_bytes(content)
        return str(self.folder)


@pytest.mark.parametrize("place", ["some/model", "hf://some/model", "ms://some/model"])
def test_a_hubs_id_is_downloaded_without_pickled_weights(place, tmp_path, monkeypatch):
    files = {"config.json": b"{}", "model.safetensors": b"", "pytorch_model.bin": b""}
    hub = Hub(tmp_path, files)
    monkeypatch.setattr(importlib, "import_module", lambda package: hub)
    with local_source(place, allow_pickle=True) as folder:
        assert sorted(path.name for path in folder.iterdir()) == sorted(files)[:2]
    assert [each[0] for each in hub.asked] == ["some/model"]


def test_pickled_weights_are_downloaded_where_they_are_allowed_and_there_is_nothing_else(
    tmp_path, monkeypatch
):
    files = {"config.json": b"{}", "pytorch_model.bin": b"", "pytorch_model.bin.index.json": b"{}"}
    hub = Hub(tmp_path, files | {"training_args.bin": b""})
    monkeypatch.setattr(importlib, "import_module", lambda package: hub)
    with local_source("some/model") as folder:
        assert not (folder / "pytorch_model.bin").exists()
        with pytest.raises(CheckpointError, match="import --allow-pickle"):
            open_checkpoint(folder)
    with local_source("some/model", allow_pickle=True) as folder:
        assert sorted(path.name for path in folder.iterdir()) == sorted(files)


def test_pickled_weights_that_are_there_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"import --allow-pickle`, then .*convert export`"):
        open_checkpoint(tmp_path)
