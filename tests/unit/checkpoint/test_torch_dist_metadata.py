"""Metadata of torch_dist checkpoints, as torch and Megatron write it, and pickles that do harm."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatrain.checkpoint.torch_dist_metadata import FILE, LATEST, find_checkpoint, read_metadata
from megatrain.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def saved(tmp_path):
    """A checkpoint by torch."""
    state = {"a": {"w": torch.ones(3, 4, dtype=torch.bfloat16)}, "steps": 3, "l": [torch.ones(2)]}
    dcp.save(state, checkpoint_id=str(tmp_path / "saved"), no_dist=True)
    return tmp_path / "saved"


def test_what_torch_wrote_is_read_as_torch_reads_it(saved):
    assert read_metadata(saved) == _as_torch_reads_it(saved)
    entry = read_metadata(saved).state_dict_metadata["a.w"]
    assert (entry.size, entry.properties.dtype) == ((3, 4), torch.bfloat16)


@pytest.mark.slow
def test_what_megatron_wrote_is_read(tmp_path):
    folder = tmp_path / "megatron"
    script = Path(__file__).with_name("save_torch_dist.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    found = read_metadata(folder)
    assert found == _as_torch_reads_it(folder)
    w = found.state_dict_metadata["w"]
    assert (w.size, w.properties.dtype) == ((6, 4), torch.float32)
    assert sorted(chunk.offsets for chunk in w.chunks) == [(0, 0), (3, 0)]
    assert found.state_dict_metadata["half"].properties.dtype == torch.bfloat16
    objects = [k for k, v in found.state_dict_metadata.items() if v == BytesStorageMetadata()]
    assert [name.split("/")[0] for name in objects] == ["extra", "common_state"]


class _Harm:
    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.system, "posix.system"),
        (eval, "builtins.eval"),
        (torch.load, "torch.serialization.load"),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_pickle_that_names_anything_else_is_refused_and_not_run(saved, function, named, inside):
    proof = saved / "proof"
    text = {"posix.system": f"touch {proof}", "builtins.eval": f"open({str(proof)!r}, 'w')"}
    harm = _Harm(function, text.get(named, str(proof)))
    content = Metadata({"a": BytesStorageMetadata()}, planner_data=harm) if inside else harm
    (saved / FILE).write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=named):
        read_metadata(saved)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["hub", "nn.Module", "Size.count", "load", "classes"])
def test_other_names_of_torch_are_refused(saved, name):
    (saved / FILE).write_bytes(
        b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    )
    with pytest.raises(CheckpointError, match=f"torch.{name}"):
        read_metadata(saved)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_pickle_that_is_cut_short_is_refused(saved, keep):
    data = (saved / FILE).read_bytes()
    (saved / FILE).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="cut short"):
        read_metadata(saved)


@pytest.mark.parametrize("content", [{}, 3, Metadata(state_dict_metadata=[])])
def test_a_pickle_of_something_else_is_refused(saved, content):
    (saved / FILE).write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="holds no Metadata"):
        read_metadata(saved)


def test_a_missing_file_is_named(saved):
    (saved / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"missing: __0_0\.distcp"):
        read_metadata(saved)


@pytest.mark.parametrize("place", ["../other.distcp", "/etc/hostname"])
def test_a_file_outside_the_folder_is_refused(saved, place):
    found = read_metadata(saved)
    for info in found.storage_data.values():
        info.relative_path = place
    (saved / FILE).write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_metadata(saved)


def test_the_latest_iteration_is_found(saved):
    saved.rename(saved.parent / "iter_0000012")
    assert find_checkpoint(saved.parent) is None
    (saved.parent / LATEST).write_text("12\n")
    assert find_checkpoint(saved.parent) == saved.parent / "iter_0000012"
    (saved.parent / LATEST).write_text("13")
    with pytest.raises(CheckpointError, match="names iter_0000013"):
        find_checkpoint(saved.parent)
    (saved.parent / LATEST).write_text("../x")
    with pytest.raises(CheckpointError, match="a number or"):
        find_checkpoint(saved.parent)


def _as_torch_reads_it(folder):
    expected = dcp.FileSystemReader(str(folder)).read_metadata()
    if expected.storage_meta is not None:
        expected.storage_meta.load_id = None
        place = expected.storage_meta.checkpoint_id
        if isinstance(place, Path):
            from pathlib import PurePosixPath

            expected.storage_meta.checkpoint_id = PurePosixPath(place)
    return expected
