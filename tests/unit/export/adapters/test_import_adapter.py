"""PEFT directory to state and back: the same bytes, the same config, and no base at hand."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM

from megatrain.config.lora import LoraSpec
from megatrain.errors import ConfigError, ExportError
from megatrain.export.adapters.canonical import canonical
from megatrain.export.adapters.from_state import check_same_as, for_peft, read_saved
from megatrain.export.adapters.import_adapter import import_adapter
from megatrain.export.adapters.peft_file import read_peft
from megatrain.export.peft_adapter import CONFIG, WEIGHTS, write_adapter, write_files
from megatrain.export.state.imported import check_imported
from megatrain.export.state.record import read_record
from megatrain.export.state.retention import verify_state
from tests.unit.export.adapters.made import (
    CASES,
    DENSE,
    FUSED,
    HEADS,
    STACKED,
    peft_adapter,
    quiet,
    same_bytes,
    tensors_in,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES.keys())
@pytest.mark.slow
def test_an_imported_adapter_is_exported_byte_for_byte(
    family, options, dtype, checkpoints, tmp_path
):
    model = peft_adapter(checkpoints(family), tmp_path / "peft", options, dtype=dtype)
    import_adapter(tmp_path / "peft", tmp_path / "state", model_type=family)
    verify_state(tmp_path / "state")
    write_files(tmp_path / "out", for_peft(read_saved(tmp_path / "state")))
    assert same_bytes(*(load_file(tmp_path / each / WEIGHTS) for each in ("peft", "out")))
    configs = [json.loads((tmp_path / each / CONFIG).read_text()) for each in ("peft", "out")]
    assert configs[0] == configs[1]
    assert check_same_as(read_saved(tmp_path / "state"), tmp_path / "peft")
    check_deltas(model, tmp_path / "state")


def check_deltas(model, state):
    """Every linear's scale * B A in the state is the weight that PEFT would add."""
    saved = read_saved(state)
    shapes = read_record(state).imported.shapes
    theirs = {
        re.sub(r"(\.base_layer)+$", "", name.removeprefix("base_model.model.")): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    checked = 0
    for name, a in saved.tensors.items():
        module, _, factor = name.rpartition(".")
        if factor == "lora_B" or ".experts." in name:
            continue
        b = saved.tensors[f"{module}.lora_B"]
        ours = saved.spec.scale_of(module) * (b.float() @ a.float())
        theirs_w = theirs[module].get_delta_weight("default").float()
        theirs_w = theirs_w if theirs_w.shape == ours.shape else theirs_w.T
        torch.testing.assert_close(ours, theirs_w, rtol=2e-2, atol=1e-2)
        assert shapes[module] == (a.shape[1], b.shape[0])
        checked += 1
    assert checked or any(".experts." in name for name in saved.tensors)


def test_neither_import_nor_export_looks_at_the_base(checkpoints, tmp_path):
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", DENSE)
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    config["base_model_name_or_path"] = "/nowhere/at/all"
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(config))
    import_adapter(tmp_path / "peft", tmp_path / "state")
    assert check_same_as(read_saved(tmp_path / "state"), tmp_path / "peft")
    assert read_record(tmp_path / "state").fingerprint is None


def test_fused_gate_and_up_come_apart_at_the_whole_rank_exactly(checkpoints, tmp_path):
    model = peft_adapter(checkpoints("qwen3_moe"), tmp_path / "peft", FUSED)
    parts = canonical(read_peft(tmp_path / "peft"), "qwen3_moe")
    experts = "model.layers.1.mlp.experts"
    wrapper = model.get_submodule(f"base_model.model.{experts}.base_layer")
    delta = wrapper.get_delta_weight("default")
    for expert in range(4):
        for rows, leaf in ((slice(0, 32), "gate_proj"), (slice(32, 64), "up_proj")):
            name = f"{experts}.{expert}.{leaf}"
            a, b = (parts.tensors[f"{name}.lora_{each}"] for each in "AB")
            assert a.shape == (8, 64)
            assert parts.spec.rank_of(name) == 8
            ours = parts.spec.scale_of(name) * (b @ a)
            torch.testing.assert_close(ours, delta[expert, rows], rtol=0, atol=1e-5)


def test_experts_one_by_one_are_read_with_the_numbers_of_their_fused_parameter(tmp_path):
    """A file as megatrain writes it: full names and fused ranks, which PEFT reads."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    spec = LoraSpec(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear")
    names = [
        f"model.layers.{n}.block_sparse_moe.experts.{e}.{leaf}"
        for n in (0, 1)
        for e in range(4)
        for leaf in ("w1", "w2", "w3")
    ]
    factors = {}
    for name in names:
        width = (8, 16) if name.endswith("w2") else (16, 8)
        factors |= {f"{name}.lora_A": torch.randn(4, width[0])}
        factors |= {f"{name}.lora_B": torch.randn(width[1], 4)}
    write_adapter(
        tmp_path / "peft", spec=spec, tensors=factors, base_model="x", hf_config=config.to_dict()
    )
    parts = canonical(read_peft(tmp_path / "peft"), None)
    assert same_bytes(dict(parts.tensors), factors)
    for name in names:
        assert parts.spec.rank_of(name) == 4
        assert parts.spec.scale_of(name) == pytest.approx(spec.scale_of(name), rel=1e-12)
    parameters = ["mlp.experts.gate_up_proj", "mlp.gate.weight"]
    stacked = get_peft_model(
        MixtralForCausalLM(config),
        LoraConfig(r=4, target_modules=[], target_parameters=parameters),
    )
    stacked.save_pretrained(tmp_path / "stacked")
    parts = canonical(read_peft(tmp_path / "stacked"), "mixtral")
    assert "model.layers.1.block_sparse_moe.experts.3.w3.lora_B" in parts.tensors
    assert "model.layers.1.block_sparse_moe.gate.lora_A" in parts.tensors
    import_adapter(tmp_path / "stacked", tmp_path / "state", model_type="mixtral")
    assert check_same_as(read_saved(tmp_path / "state"), tmp_path / "stacked")


def test_stacked_experts_of_an_unknown_family_are_refused_until_it_is_named(checkpoints, tmp_path):
    peft_adapter(checkpoints("gpt_oss"), tmp_path / "peft", STACKED)
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    config |= {"base_model_name_or_path": "somewhere/else", "auto_mapping": None}
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError, match="--model-type says it"):
        import_adapter(tmp_path / "peft", tmp_path / "state")
    assert not (tmp_path / "state").exists()
    with pytest.raises(ExportError, match="no model_type 'gpt_os'"):
        import_adapter(tmp_path / "peft", tmp_path / "state", model_type="gpt_os")
    import_adapter(tmp_path / "peft", tmp_path / "state", model_type="gpt_oss")
    names = read_saved(tmp_path / "state").tensors
    assert "model.layers.3.mlp.experts.3.gate_up_proj.lora_A" in names


def test_a_score_head_goes_along(checkpoints, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(checkpoints("qwen3"), num_labels=1)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    quiet(get_peft_model)(base, config).save_pretrained(tmp_path / "peft")
    import_adapter(tmp_path / "peft", tmp_path / "state")
    assert read_saved(tmp_path / "state").tensors["score.weight"].shape == (1, 64)
    assert check_same_as(read_saved(tmp_path / "state"), tmp_path / "peft")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ],
    ids=["dora", "bias", "saved-module", "replication"],
)
def test_what_megatrain_does_not_train_is_refused_by_name(options, text, checkpoints, tmp_path):
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", {"target_modules": ["q_proj"]} | options)
    with pytest.raises(ConfigError, match=text):
        import_adapter(tmp_path / "peft", tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_another_kind_of_adapter_is_refused_by_name(tmp_path):
    tmp_path.joinpath("a").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "a" / WEIGHTS)
    (tmp_path / "a" / CONFIG).write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ConfigError, match="only LoRA is supported: peft_type='IA3'"):
        import_adapter(tmp_path / "a", tmp_path / "state")


def drop_factor(weights, config):
    del weights[min(key for key in weights if "lora_" in key)]


def cut_rank(weights, config):
    key = min(key for key in weights if "lora_" in key)
    weights[key] = weights[key][:-1].contiguous()


def other_rank(weights, config):
    config["r"] = 3


def stranger(weights, config):
    weights["base_model.model.model.norm.weight"] = torch.ones(64)


@pytest.mark.parametrize("damage", [drop_factor, cut_rank, other_rank, stranger])
@pytest.mark.parametrize(
    ("family", "options"), [("qwen3", HEADS), ("gpt_oss", STACKED | {"rank_pattern": {}})]
)
def test_a_damaged_adapter_is_refused_and_nothing_is_written(
    family, options, damage, checkpoints, tmp_path
):
    peft_adapter(checkpoints(family), tmp_path / "peft", options)
    weights = load_file(tmp_path / "peft" / WEIGHTS)
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    damage(weights, config)
    save_file(weights, tmp_path / "peft" / WEIGHTS)
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError):
        import_adapter(tmp_path / "peft", tmp_path / "state", model_type=family)
    assert [each.name for each in tmp_path.iterdir()] == ["peft"]


def test_pickles_and_truncated_files_are_refused(checkpoints, tmp_path):
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", HEADS)
    path = tmp_path / "peft" / WEIGHTS
    content = path.read_bytes()
    for size in (4, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ExportError, match=f"cannot read {path}"):
            import_adapter(tmp_path / "peft", tmp_path / "state")
    path.rename(tmp_path / "peft" / "adapter_model.bin")
    with pytest.raises(ExportError, match="pickled weights are not read"):
        import_adapter(tmp_path / "peft", tmp_path / "state")


def test_a_record_says_which_base_fits(checkpoints, tmp_path):
    folder = checkpoints("qwen3_moe")
    peft_adapter(folder, tmp_path / "peft", STACKED)
    import_adapter(tmp_path / "peft", tmp_path / "state")
    imported = read_record(tmp_path / "state").imported
    shapes = {name: tuple(value.shape) for name, value in tensors_in(folder).items()}
    check_imported(imported, shapes, folder)
    fewer = {name: shape for name, shape in shapes.items() if ".experts.3." not in name}
    with pytest.raises(Exception, match="of 4 experts, the base has 3"):
        check_imported(imported, fewer, folder)
    dense = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    with pytest.raises(Exception, match=r"experts.gate_proj .* the base has \[\]"):
        check_imported(imported, dense, folder)
