"""LoRA on everything that can be named: embedding, head, router, fused expert tensors, patterns."""

import pytest

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import full_tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.truth import (
    all_logps,
    hf_model,
    largest_adapter_difference,
    largest_difference,
    peft_model,
    relative_difference,
)

pytestmark = pytest.mark.multiprocess

BATCHES = [random_batch(5, seed=seed) for seed in range(2)]
TOLERANCE = 1e-5
"""Float32 sums in another order differ by 1e-6."""

GRADIENT_TOLERANCE = 3e-5
"""Relative to a tensor's largest entry.  Seen: 1.2e-5 where latent attention norms a latent of 16
entries twice, 3e-6 elsewhere; a term that is lost or doubled shows as 1e-1."""

RANDOM = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
TARGETS = {
    "embedding-and-head": ("qwen3", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "router": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    ),
    "experts-down": ("qwen3_moe", {"target_modules": ["down_proj"]}),
    "fused-experts": ("gpt_oss", {"target_modules": "all-linear"}),
    "latent-attention-and-shared-experts": ("deepseek_v3", {"target_modules": "all-linear"}),
    "fused-gate-up": ("gpt_oss", {"target_modules": ["gate_up_proj", "o_proj"]}),
    "fused-down-router": (
        "gpt_oss",
        {
            "target_modules": ["k_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.router.weight"],
        },
    ),
    "patterns": (
        "qwen3",
        {
            "target_modules": ["q_proj", "k_proj", "gate_proj", "up_proj"],
            "rank_pattern": {"q_proj": 8, "layers.1.*up_proj": 2},
            "alpha_pattern": {"k_proj": 32},
            "use_rslora": True,
            "layers_to_transform": [1, 2],
        },
    ),
    "regex": ("llama", {"target_modules": r".*layers\.[02]\..*(v|o)_proj"}),
    "one-part-of-each": ("qwen2", {"target_modules": ["v_proj", "up_proj"]}),
    "excluded": ("qwen3", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
}
SPLIT = {
    "qwen3_moe": DeviceMesh(tp=2, ep=2),
    "deepseek_v3": DeviceMesh(dp=2, tp=2, ep=2),
    "gpt_oss": DeviceMesh(dp=2, tp=2, ep=2),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.slow
def test_named_targets_train_alike_when_split_and_export_exactly(
    name, ranks, checkpoints, tmp_path
):
    family, targets = TARGETS[name]
    lora, folder = {**RANDOM, **targets}, checkpoints(family)
    one, split = (
        ranks.run(full_tasks.train_targets, mesh, folder, lora, BATCHES, str(tmp_path / kind))[0]
        for kind, mesh in (
            ("one", DeviceMesh()),
            ("split", SPLIT.get(family, DeviceMesh(tp=2, pp=2))),
        )
    )
    assert relative_difference(split["gradient"], one["gradient"]) <= GRADIENT_TOLERANCE
    assert largest_adapter_difference(split["adapter"], one["adapter"]) <= TOLERANCE
    for report in (one, split):
        expected = all_logps(peft_model(folder, report["saved"]), BATCHES[0])
        assert largest_difference(report["logps"], expected) <= TOLERANCE


def test_adapters_trained_in_turn_are_those_trained_alone(ranks, checkpoints):
    report = ranks.run(full_tasks.two_adapters, DeviceMesh(tp=2), checkpoints("qwen3"), BATCHES)[0]
    for name in ("a", "b"):
        assert largest_adapter_difference(report[name], report[f"{name}_alone"]) == 0.0


def test_the_base_is_the_same_beside_an_adapter(ranks, checkpoints):
    report = ranks.run(
        full_tasks.base_beside_adapter, DeviceMesh(tp=2), checkpoints("qwen3_moe"), BATCHES[0]
    )[0]
    assert largest_difference(report["before"], report["beside"]) == 0.0
    assert largest_difference(report["before"], report["adapted"]) > 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_float32(precision, ranks, checkpoints):
    # bfloat16 has 8 bits of mantissa: log-probabilities near -6 are good to about 0.05 here.
    folder = checkpoints("qwen3")
    logps = ranks.run(full_tasks.bf16_logps, DeviceMesh(tp=2), folder, BATCHES[0], precision)[0]
    assert largest_difference(logps, all_logps(hf_model(folder), BATCHES[0])) <= 0.08


def test_training_in_fp16_is_refused(ranks, checkpoints):
    kinds, text = ranks.run(full_tasks.fp16_training, DeviceMesh(), checkpoints("qwen3"))[0]
    assert "ConfigError" in kinds
    assert "bf16" in text
