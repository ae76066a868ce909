"""Adapters of states that training wrote: with and without the base's config in the record."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatrain.config.lora import LoraSpec
from megatrain.errors import ExportError
from megatrain.export.adapters.from_state import for_peft, read_saved
from megatrain.export.folder import replaced
from megatrain.export.peft_adapter import WEIGHTS, write_files
from megatrain.export.state.folder import State
from megatrain.export.state.record import RECORD, _checksum_of, has_state, read_record
from tests.unit.export.adapters.made import load_peft, logits
from tests.unit.export.state import made

SPEC = LoraSpec(r=2, lora_alpha=6, target_modules=("model.layers.1.self_attn.q_proj",))


def state(path, **changes):
    """Write a state of one linear's adapter, and return its factors."""
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.1.self_attn.q_proj"
    factors = {
        f"{name}.lora_A": torch.randn(2, 64, generator=generator),
        f"{name}.lora_B": torch.randn(64, 2, generator=generator),
    }
    options = {key: getattr(SPEC, key) for key in SPEC.__dataclass_fields__}
    record = made.record(lora=options, tensors=("master",), optimizer=None, **changes)
    with replaced(path, may_replace=has_state) as folder:
        State(record, iter([("master", factors)])).write(folder)
    return factors


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_record_alone_suffices(precision, checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    config = json.loads((folder / "config.json").read_text())
    factors = state(tmp_path / "state", base_config=config, mixed_precision=precision)
    write_files(tmp_path / "out", for_peft(read_saved(tmp_path / "state")))
    for name, value in factors.items():
        ours = load_file(tmp_path / "out" / WEIGHTS)[f"base_model.model.{name}.weight"]
        assert torch.equal(ours, value.bfloat16() if precision == "bf16" else value)
    logits(load_peft(folder, tmp_path / "out"))


def test_a_record_of_the_first_format_is_read_and_wants_the_base_named(checkpoints, tmp_path):
    state(tmp_path / "state", version=1)
    path = tmp_path / "state" / "state" / RECORD
    content = json.loads(path.read_text())
    del content["base_config"], content["imported"], content["checksum"]
    content["checksum"] = _checksum_of(content)
    path.write_text(json.dumps(content))
    assert read_record(tmp_path / "state").version == 1
    with pytest.raises(ExportError, match=r"of format 1, does not hold its base's config.json"):
        for_peft(read_saved(tmp_path / "state"))
    config = json.loads((checkpoints("qwen3") / "config.json").read_text())
    assert for_peft(read_saved(tmp_path / "state"), config).config["r"] == 2


def test_a_state_of_a_whole_model_is_refused(tmp_path):
    made.checkpoint(tmp_path / "state", lora=None)
    with pytest.raises(ExportError, match="of all parameters, not of an adapter"):
        read_saved(tmp_path / "state")
