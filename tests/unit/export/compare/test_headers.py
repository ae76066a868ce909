"""Headers of safetensors: what they say, and every kind of damage by its own words."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatrain.errors import CheckpointError
from megatrain.export.compare.headers import read_file, read_folder

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """Two shards with an index."""
    first = {"a": torch.arange(12.0).view(4, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_file(first, tmp_path / "1.safetensors")
    save_file({"c": torch.tensor(7, dtype=torch.uint8)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    return tmp_path


def write_index(folder, files):
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("with_index", [True, False])
def test_headers_say_where_each_tensor_is(folder, with_index):
    if not with_index:
        (folder / INDEX).unlink()
    found = read_folder(folder)
    told = {name: (each.dtype, each.shape, each.num_bytes) for name, each in found.items()}
    assert told == {"a": ("F32", (4, 3), 48), "b": ("BF16", (2,), 4), "c": ("U8", (), 1)}
    values = b"".join(found["a"].blocks(size=5))
    assert values == torch.arange(12.0).numpy().tobytes()


def test_a_missing_shard_is_named(folder):
    (folder / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shard\(s\).*2\.safetensors"):
        read_folder(folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 40])
def test_a_truncated_header_is_refused(folder, keep):
    path = folder / "1.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut short.*1\.safetensors"):
        read_folder(folder)


def test_truncated_values_are_refused(folder):
    path = folder / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short or altered"):
        read_file(path)


def test_an_index_that_names_an_absent_tensor_is_refused(folder):
    write_index(
        folder,
        {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", "d": "2.safetensors"},
    )
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) that their shards lack: d in 2"):
        read_folder(folder)


def test_a_tensor_that_the_index_does_not_name_is_refused(folder):
    write_index(folder, {"a": "1.safetensors", "c": "2.safetensors"})
    with pytest.raises(CheckpointError, match=r"not in .*: b"):
        read_folder(folder)


@pytest.mark.parametrize("place", ["../{name}/1.safetensors", "{folder}/1.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(folder, place):
    file = place.format(name=folder.name, folder=folder)
    write_index(folder, {"a": file, "b": file, "c": "2.safetensors"})
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_folder(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "{}", '{"weight_map": [1]}', "[]", '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "has 8 bytes"),
        ({"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}, "unknown dtype: 'F33'"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "a shape that are none"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "does not begin"),
        ({"shape": [1], "data_offsets": [0, 4]}, "not a safetensors file"),
    ],
)
def test_a_header_that_does_not_fit_itself_is_refused(tmp_path, entry, match):
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=match):
        read_file(path)


def test_a_name_in_two_files_is_refused(folder):
    (folder / INDEX).unlink()
    save_file({"a": torch.ones(1)}, folder / "3.safetensors")
    with pytest.raises(CheckpointError, match=r"3\.safetensors and in another file"):
        read_folder(folder)
