"""The estimate's arithmetic, beside Transformers' own counts and figures worked out by hand."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers

from megatrain.config.estimate import DEVICES, ModelShape, Training, estimate, human, render
from megatrain.config.estimate.memory import in_flight
from megatrain.config.estimate.work import Work
from megatrain.errors import ConfigError, LayoutError, UnknownFamilyError
from megatrain.parallel.layout import DeviceMesh
from megatrain.testing.tiny import COMMON, FAMILIES

LORA = {"r": 8, "target_modules": "all-linear"}
QWEN = {
    "model_type": "qwen3",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
MOE = QWEN | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
ONE = DeviceMesh()


def config_of(family):
    """Return config.json of a tiny family."""
    name, own = FAMILIES[family]
    return getattr(transformers, name)(**{**COMMON, **own})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_parameters_are_as_many_as_transformers_has(family):
    config = config_of(family)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = sum(p.numel() for p in model.parameters())
    assert estimate(config.to_dict(), ONE, Training()).parameters.total == expected


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "qwen3_moe"])
def test_active_parameters_are_those_counted_from_tensors(family):
    config = config_of(family)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {}
    for name, value in model.named_parameters():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            shapes[name] = list(value.shape)
    expected = Work.of(shapes, config.to_dict())
    assert Work.of_shape(ModelShape.from_config(config.to_dict())) == expected


def test_optimizer_state_is_shared_over_dp_and_gradients_are_not():
    one = estimate(QWEN, ONE, Training(precision="no")).ranks[0]
    four = estimate(QWEN, DeviceMesh(dp=4), Training(precision="no")).ranks[0]
    total = sum(one.parameters.values())
    assert one.weights == one.gradients == four.gradients == 4 * total
    assert one.optimizer == 3 * 4 * total  # masters and two moments
    assert four.optimizer == one.optimizer // 4
    sgd = estimate(QWEN, ONE, Training(precision="bf16", optimizer="SGD")).ranks[0]
    assert (sgd.weights, sgd.optimizer) == (2 * total, 4 * total)


def test_an_offloaded_optimizer_is_in_the_hosts_memory():
    mesh, training = DeviceMesh(dp=4), Training(precision="no")
    here = estimate(QWEN, mesh, training).ranks[0]
    result = estimate(QWEN, mesh, replace(training, offload_optimizer=True))
    away = result.ranks[0]
    share = sum(here.parameters.values()) // 4
    assert (here.optimizer, here.host) == (12 * share, 0)
    assert (away.optimizer, away.host) == (0, 12 * share + 4 * share)  # and the gradients it reads
    assert here.peak - away.peak == here.optimizer
    assert "of the host's" in render(result)[-1]


def test_fsdp_shards_what_is_held_and_gathers_two_layers():
    whole = estimate(QWEN, DeviceMesh(dp=4), Training(precision="no")).ranks[0]
    sharded = estimate(QWEN, DeviceMesh(dp=4, fsdp=4), Training(precision="no")).ranks[0]
    # The embedding and the head, 64,000 entries each, are larger than a layer.
    assert sharded.weights == whole.weights // 4 + 2 * 4 * 64_000
    assert sharded.gradients == whole.gradients // 4
    assert sharded.optimizer == whole.optimizer


def test_lora_trains_its_factors_alone():
    found = estimate(QWEN, ONE, Training(lora={"r": 8, "target_modules": ["q_proj", "down_proj"]}))
    factors = 4 * 8 * (64 + 64 + 128 + 64)
    assert found.parameters.trained == found.ranks[0].trained == factors
    assert found.ranks[0].gradients == 4 * factors
    base = estimate(QWEN, ONE, Training()).ranks[0]
    assert found.ranks[0].weights == base.weights + 2 * factors


def test_without_an_optimizer_nothing_is_kept_for_backward():
    found = estimate(QWEN, ONE, Training(optimizer=None)).ranks[0]
    assert found.gradients == found.optimizer == found.activations == 0
    assert found.weights < found.peak < 2 * estimate(QWEN, ONE, Training()).peak


def test_activations_grow_with_tokens_and_shrink_with_tp_cp_and_recomputation():
    training = Training(lora=LORA, sequence_length=512, tokens_per_microbatch=2048)

    def activations(mesh, **changes):
        return estimate(QWEN, mesh, replace(training, **changes)).ranks[0].activations

    one = activations(ONE)
    assert activations(ONE, tokens_per_microbatch=4096) == pytest.approx(2 * one, rel=0.05)
    # The head keeps the hidden states of all labels on every rank.
    assert activations(DeviceMesh(tp=2)) == pytest.approx(one / 2, rel=0.1)
    assert one / 2 < activations(DeviceMesh(cp=2)) < 0.7 * one  # keys and values of both ranks
    assert activations(ONE, recompute=True) < one / 5


def test_early_stages_keep_more_micro_batches():
    assert [in_flight(DeviceMesh(pp=4), stage) for stage in range(4)] == [4, 3, 2, 1]
    # Interleaving keeps (1 + (p - 1) / (p v)) times as much as 1F1B's first stage.
    assert in_flight(DeviceMesh(pp=4, vpp=2), 0) == pytest.approx(4 * (1 + 3 / 8))
    first, last = estimate(QWEN, DeviceMesh(pp=2), Training(lora=LORA)).ranks
    assert first.activations == pytest.approx(2 * last.activations, rel=0.1)


def test_work_is_four_or_six_flops_an_active_parameter_and_attention():
    length = 256
    for training, per_parameter in ((Training(lora=LORA), 4), (Training(), 6)):
        found = estimate(QWEN, ONE, replace(training, sequence_length=length))
        attention = 6 * 4 * 4 * 16 * length
        assert found.flops_per_token == per_parameter * found.parameters.active + attention


def test_time_is_for_the_same_batch_on_more_devices_less():
    training = Training(lora=LORA, tokens_per_step=65_536)
    one, two = (estimate(QWEN, mesh, training, device="h100") for mesh in (ONE, DeviceMesh(dp=2)))
    assert one.tokens_per_second < two.tokens_per_second < 2 * one.tokens_per_second
    assert (
        one.time.total
        == one.seconds_per_step
        == pytest.approx(
            sum([one.time.compute, one.time.bubble, one.time.communication, one.time.gradients])
        )
    )
    assert one.time.communication == one.time.bubble == one.time.gradients == 0
    pipeline = estimate(QWEN, DeviceMesh(pp=2), training, device="h100")
    assert pipeline.time.bubble > 0
    within = estimate(QWEN, DeviceMesh(tp=2), training, device="h100")
    across = estimate(QWEN, DeviceMesh(tp=2), training, device="h100", ranks_per_node=1)
    assert across.time.communication > within.time.communication


def test_without_a_device_there_is_no_time_and_no_overhead():
    found = estimate(QWEN, ONE, Training())
    assert found.time is None
    assert found.tokens_per_second is None
    with_device = estimate(QWEN, ONE, Training(), device="a100")
    assert with_device.peak == found.peak + DEVICES["a100"].overhead


@pytest.mark.parametrize(
    ("config", "mesh", "training", "error", "message"),
    [
        (QWEN | {"model_type": "qwen33"}, ONE, {}, UnknownFamilyError, "did you mean 'qwen3"),
        (QWEN | {"model_type": None}, ONE, {}, UnknownFamilyError, "known: llama"),
        ({**QWEN, "hidden_size": None}, ONE, {}, ConfigError, "hidden_size"),
        ({**MOE, "num_experts_per_tok": "2"}, ONE, {}, ConfigError, "num_experts_per_tok"),
        ({**QWEN, "layer_types": ["linear_attention"]}, ONE, {}, ConfigError, "linear_attention"),
        ({**QWEN, "attention_bias": True}, ONE, {}, ConfigError, "attention_bias"),
        (QWEN, DeviceMesh(tp=3), {}, LayoutError, "tp must divide"),
        (QWEN, DeviceMesh(pp=3), {}, LayoutError, "number of layers"),
        (QWEN, DeviceMesh(dp=2, ep=2), {}, LayoutError, "no experts"),
        (MOE, DeviceMesh(dp=3, ep=3), {}, LayoutError, "number of experts"),
        (QWEN, ONE, {"precision": "fp8"}, ConfigError, "precision"),
        (QWEN, ONE, {"optimizer": "Lion"}, ConfigError, "Lion"),
        (QWEN, ONE, {"sequence_length": 0}, ConfigError, "sequence_length"),
        (QWEN, ONE, {"label_fraction": 2}, ConfigError, "label_fraction"),
        (QWEN, ONE, {"lora": {"r": 0}}, ConfigError, "r must"),
    ],
)
def test_what_is_not_known_is_refused_by_name(config, mesh, training, error, message):
    with pytest.raises(error, match=message):
        estimate(config, mesh, Training(**training))


def test_a_device_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="h100"):
        estimate(QWEN, ONE, Training(), device="h1000")


def test_config_may_be_a_folder_or_a_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        estimate(tmp_path, ONE, Training())
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    expected = estimate(QWEN, ONE, Training()).to_dict()
    assert estimate(tmp_path, ONE, Training()).to_dict() == expected
    assert estimate(str(tmp_path / "config.json"), ONE, Training()).to_dict() == expected
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        estimate(tmp_path, ONE, Training())


def test_lines_say_what_the_estimate_says():
    result = estimate(MOE, DeviceMesh(pp=2, dp=2, ep=2), Training(lora=LORA), device="h100")
    text = "\n".join(render(result))
    assert f"{human(result.parameters.total)} parameters" in text
    for rank in result.ranks:
        line = next(line for line in text.splitlines() if f"stage {rank.stage}" in line)
        assert human(rank.peak, "B") in line
        assert f"activations {human(rank.activations, 'B')}" in line
    assert f"{human(result.tokens_per_second)} tokens/s" in text
    json.dumps(result.to_dict())


def test_the_estimate_needs_no_torch():
    code = "import sys, megatrain.config.estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
