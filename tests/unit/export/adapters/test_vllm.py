"""Adapters for vLLM: one rank, one scale, and the same products; PEFT reads the file, too."""

import json

import pytest
import torch

from megatrain.errors import ExportError
from megatrain.export.adapters.from_state import embeddings_of, for_peft, read_saved
from megatrain.export.adapters.import_adapter import import_adapter
from megatrain.export.adapters.peft_file import read_peft
from megatrain.export.adapters.products import largest_difference
from megatrain.export.adapters.vllm import for_vllm
from megatrain.export.peft_adapter import CONFIG, WEIGHTS, write_files
from tests.unit.export.adapters.made import (
    CASES,
    DENSE,
    FUSED,
    HEADS,
    STACKED,
    load_peft,
    logits,
    peft_adapter,
    tensors_in,
)

PACKED = ("gate_up_proj", "qkv_proj")
WHOLE = STACKED | {"rank_pattern": {"layers.1.mlp.experts.gate_up_proj": 6}}


def exported(tmp_path, family):
    import_adapter(tmp_path / "peft", tmp_path / "state", model_type=family)
    saved = read_saved(tmp_path / "state")
    adapter = for_vllm(
        saved.spec, saved.tensors, base_model="x", embeddings=embeddings_of(for_peft(saved))
    )
    write_files(tmp_path / "vllm", adapter.files)
    return saved, adapter


@pytest.mark.parametrize(
    ("family", "options", "targets", "experts", "max_rank"),
    [
        ("qwen3", DENSE, tuple(sorted([*DENSE["target_modules"], *PACKED])), "none", 8),
        ("qwen3", HEADS, ("embed_tokens", "lm_head", "q_proj", "qkv_proj"), "none", 8),
        ("qwen3_moe", FUSED, ("experts", "q_proj", "qkv_proj"), "per expert", 8),
        ("qwen3_moe", WHOLE, ("experts", "o_proj"), "per expert", 8),
        ("gpt_oss", WHOLE | {"r": 9}, ("experts", "o_proj"), "stacked", 16),
    ],
    ids=["dense", "heads", "fused", "stacked-in-peft", "gpt-oss"],
)
@pytest.mark.slow
def test_peft_computes_the_same_with_one_rank_and_scale_one(
    family, options, targets, experts, max_rank, checkpoints, tmp_path
):
    folder = checkpoints(family)
    theirs = peft_adapter(folder, tmp_path / "peft", options)
    _, adapter = exported(tmp_path, family)
    config = json.loads((tmp_path / "vllm" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"]
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["use_rslora"] is False
    assert all("." not in name for name in config["target_modules"])
    assert adapter.target_modules == targets
    assert (adapter.experts, adapter.max_lora_rank) == (experts, max_rank)
    keys = tensors_in(tmp_path / "vllm")
    if experts == "per expert":
        key = "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_A.weight"
        assert keys[key].shape == (config["r"], 64)
    ours = load_peft(folder, tmp_path / "vllm")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_linears_that_not_every_family_packs_are_named_as_they_are_and_as_packed(
    checkpoints, tmp_path
):
    # A linear that --lora-target-modules does not name is left out by vLLM without a word.
    options = {"target_modules": ["q_proj", "kv_a_proj_with_mqa"]}
    peft_adapter(checkpoints("deepseek_v2"), tmp_path / "peft", options)
    _, adapter = exported(tmp_path, "deepseek_v2")
    names = ("fused_qkv_a_proj", "kv_a_proj_with_mqa", "q_proj", "qkv_proj")
    assert adapter.target_modules == names


def test_scales_go_into_b_in_float32_and_are_rounded_once(checkpoints, tmp_path):
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", DENSE, dtype=torch.bfloat16)
    saved, adapter = exported(tmp_path, "qwen3")
    name = "model.layers.1.mlp.up_proj"
    b, scale = saved.tensors[f"{name}.lora_B"], 6 / 2
    ours = adapter.files.weights[f"base_model.model.{name}.lora_B.weight"]
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours[:, :4], (b.float() * scale).bfloat16())
    assert not ours[:, 4:].any()
    file = read_peft(tmp_path / "vllm")
    assert largest_difference(file, saved.spec, saved.tensors) <= 2**-8
    assert (tmp_path / "vllm" / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("experts and router", r"mlp\.gate.*no LoRA|experts.*take all"),
        ("latent attention", "kv_b_proj: vLLM multiplies it into other weights"),
    ],
)
def test_what_vllm_cannot_hold_is_refused_by_name(case, text, checkpoints, tmp_path):
    family, options = CASES[case]
    peft_adapter(checkpoints(family), tmp_path / "peft", options)
    with pytest.raises(ExportError, match=text):
        exported(tmp_path, family)


def test_ranks_above_vllms_and_experts_without_down_are_refused(checkpoints, tmp_path):
    options = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    peft_adapter(checkpoints("qwen3_moe"), tmp_path / "peft", options)
    with pytest.raises(ExportError, match="take all of their linears"):
        exported(tmp_path, "qwen3_moe")
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", {"target_modules": ["q_proj"], "r": 513})
    with pytest.raises(ExportError, match="ranks up to 512: this adapter has 513"):
        exported(tmp_path, "qwen3")
