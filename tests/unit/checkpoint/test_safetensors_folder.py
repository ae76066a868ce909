"""A folder of safetensors as one lazy mapping, and what is said of a broken one."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatrain.checkpoint.locate import locate
from megatrain.checkpoint.safetensors_folder import INDEX, SafetensorsFolder
from megatrain.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    """Two shards with an index."""
    save_file({"a": torch.arange(12.0).view(4, 3), "b": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"c": torch.tensor(7.0)}, tmp_path / "2.safetensors")
    files = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    return tmp_path


@pytest.mark.parametrize("with_index", [True, False])
def test_tensors_of_all_shards_are_one_mapping(folder, with_index):
    if not with_index:
        (folder / INDEX).unlink()
    source = SafetensorsFolder(folder)
    assert sorted(source) == ["a", "b", "c"]
    assert len(source) == 3
    assert source.shapes() == {"a": (4, 3), "b": (2,), "c": ()}
    assert torch.equal(source["a"], torch.arange(12.0).view(4, 3))
    assert torch.equal(source.slice("a")[1:3, 2:], torch.tensor([[5.0], [8.0]]))
    assert source["c"] == 7.0


def test_an_unknown_tensor_is_named(folder):
    with pytest.raises(CheckpointError, match="no tensor 'd'"):
        SafetensorsFolder(folder)["d"]


def test_an_index_that_names_a_missing_shard_is_refused_before_anything_is_read(folder):
    (folder / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 shard\(s\).*2\.safetensors"):
        SafetensorsFolder(folder)


def test_an_index_that_promises_what_a_shard_lacks_is_refused(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "2.safetensors"}}))
    with pytest.raises(CheckpointError, match="lacks 'a'"):
        SafetensorsFolder(folder).shapes()


@pytest.mark.parametrize("text", ["", "{", "{}", '{"weight_map": [1]}', "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError):
        SafetensorsFolder(folder)


def test_an_index_cannot_reach_outside_its_folder(folder):
    outside = folder.parent / "outside.safetensors"
    save_file({"secret": torch.ones(1)}, outside)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"secret": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError):
        SafetensorsFolder(folder)["secret"]


@pytest.mark.parametrize("content", [b"", b"garbage, not a header", None])
def test_a_corrupt_shard_is_named(folder, content):
    shard = folder / "1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] if content is None else content)
    with pytest.raises(CheckpointError, match=r"1\.safetensors"):
        SafetensorsFolder(folder)["a"]


def test_a_folder_without_safetensors_says_how_to_convert(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors .*\n.*import --allow-pickle"):
        SafetensorsFolder(tmp_path)


def test_a_folder_with_a_config_is_where_a_checkpoint_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model_id", ["s3://bucket/model", "file:///tmp/x"])
def test_an_unknown_scheme_is_refused(model_id):
    with pytest.raises(CheckpointError, match="known: hf, ms"):
        locate(model_id)


def test_a_path_that_is_no_checkpoint_is_not_looked_up_on_a_hub(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", "./nowhere", "~/nowhere"):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            locate(str(path))


def test_a_hub_whose_package_is_missing_is_named():
    with pytest.raises(CheckpointError, match="modelscope"):
        locate("ms://some/model")
