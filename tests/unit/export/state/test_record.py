"""A state is what its record says, byte for byte, or it is refused by the name of the file."""

import json

import pytest
import torch

from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.errors import CheckpointError
from megatrain.export.peft_adapter import is_adapter
from megatrain.export.state.record import VERSION, check_files, has_state, read_record
from megatrain.export.state.retention import verify_state
from tests.unit.export.state.made import checkpoint, record, tensors


def test_what_is_written_is_read_with_every_number_exact(tmp_path):
    place = checkpoint(tmp_path / "one", saved_at=0.1 + 0.2)
    found = verify_state(place)
    assert found.model_dump(exclude={"files"}, mode="json") == record(
        saved_at=0.1 + 0.2
    ).model_dump(exclude={"files"}, mode="json")
    written = {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()}
    assert found.files.keys() == written - {"state/state.json"}
    for seed, kind in enumerate(found.tensors):
        source = SafetensorsFolder(place / "state" / kind)
        assert source.keys() == tensors(seed).keys()
        assert all(torch.equal(source[name], value) for name, value in tensors(seed).items())


def files():
    return [
        "adapter_model.safetensors",
        "adapter_config.json",
        "state/state.json",
        "state/master/model-00001-of-00002.safetensors",
        "state/exp_avg/model-00002-of-00002.safetensors",
        "state/exp_avg/model.safetensors.index.json",
    ]


@pytest.mark.parametrize("damage", ["cut", "altered", "gone"])
@pytest.mark.parametrize("name", files())
def test_a_file_that_is_cut_short_altered_or_gone_is_named(name, damage, tmp_path):
    place = checkpoint(tmp_path / "one")
    path = place / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1] if name != "state/state.json" else content[:-40])
    elif damage == "altered":
        place_of_digit = next(i for i, c in enumerate(content) if chr(c) in "0123456789{")
        changed = bytearray(content)
        changed[place_of_digit] = ord("7") if content[place_of_digit] != ord("7") else ord("8")
        path.write_bytes(bytes(changed))
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        verify_state(place)
    if not (name == "state/state.json" and damage == "gone"):
        assert name in str(caught.value)
    else:
        assert "no training state" in str(caught.value)
        assert not has_state(place)


def test_a_record_with_another_number_is_refused(tmp_path):
    place = checkpoint(tmp_path / "one")
    path = place / "state" / "state.json"
    content = json.loads(path.read_text())
    content["step"] = 4
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="checksum"):
        read_record(place)


def test_a_later_format_is_refused_by_its_number(tmp_path):
    place = checkpoint(tmp_path / "one")
    path = place / "state" / "state.json"
    content = json.loads(path.read_text())
    content["version"] = VERSION + 1
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"format version {VERSION + 1}"):
        read_record(place)


def test_sizes_alone_tell_a_cut_but_not_an_altered_file(tmp_path):
    place = checkpoint(tmp_path / "one")
    path = place / "state" / "master" / "model-00001-of-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    check_files(place, read_record(place), contents=False)
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        check_files(place, read_record(place), contents=False)


def test_an_adapter_with_a_state_may_be_replaced_and_one_with_a_foreign_file_not(tmp_path):
    place = checkpoint(tmp_path / "one", step=3)
    assert is_adapter(place)
    (place / "notes.txt").write_text("mine")
    assert not is_adapter(place)
    (place / "notes.txt").unlink()
    (place / "state" / "state.json").unlink()
    assert not is_adapter(place)


def test_a_state_is_replaced_in_one_step(tmp_path):
    place = checkpoint(tmp_path / "one", step=3)
    checkpoint(place, step=4)
    assert verify_state(place).step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
