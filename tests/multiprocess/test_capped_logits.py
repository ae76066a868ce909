"""Soft-capped logits, as Gemma 2 and 4 have them: cap * tanh(logits / cap), against Transformers.

The tiny models' cap is such that logits feel it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from megatrain.parallel.layout import DeviceMesh
from megatrain.testing.families import LOGIT_CAP
from tests.multiprocess import capped_tasks, full_tasks, tasks
from tests.multiprocess.data import num_labels, random_batch
from tests.multiprocess.test_peft_training import LORA, copy_factors, detached, peft_factors
from tests.multiprocess.truth import (
    all_logps,
    hf_model,
    largest_adapter_difference,
    largest_difference,
    logps_of,
    relative_difference,
    train,
)

pytestmark = pytest.mark.multiprocess

TOLERANCE = 3e-5
"""Float32 sums in another order: of log-probabilities up to 10, where processors differ, up to
1.5e-5 was seen; of gradients, relative to a tensor's largest."""
BATCH = random_batch(6)
MESHES = [DeviceMesh(), DeviceMesh(tp=2), DeviceMesh(cp=2), DeviceMesh(pp=2)]
SHARP = {"initializer_range": 0.05}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def transformers_model(folder: Path) -> Any:
    model: Any = hf_model(folder)
    model.set_attn_implementation("eager")  # SDPA leaves the cap of attention out
    return model


def cap_of(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Cap the logits of a model of Transformers that has no cap of its own; a forward hook."""
    output.logits = torch.tanh(output.logits / LOGIT_CAP) * LOGIT_CAP
    return output


def gradients(model: nn.Module, factors: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    loss = -sum(logps_of(model, datum).sum() for datum in BATCH) / num_labels(BATCH)
    return dict(zip(factors, torch.autograd.grad(loss, [*factors.values()]), strict=True))


def check_one_step(ours: dict[str, Any], model: nn.Module, options: dict[str, Any]) -> None:
    assert largest_difference(ours["base"], all_logps(model, BATCH)) <= TOLERANCE
    model = get_peft_model(model, LoraConfig(**options))
    factors = peft_factors(model)
    copy_factors(factors, ours["initial"])
    assert largest_difference(ours["logps"], all_logps(model, BATCH)) <= TOLERANCE
    assert relative_difference(ours["gradient"], gradients(model, factors)) <= TOLERANCE
    losses = train(model, list(factors.values()), [BATCH])
    assert ours["loss"] == pytest.approx(losses[0], abs=TOLERANCE)
    assert largest_adapter_difference(ours["adapter"], detached(factors)) <= TOLERANCE


@pytest.mark.parametrize("mesh", MESHES, ids=DeviceMesh.describe)
def test_an_adapter_under_capped_logits_trains_as_in_peft(mesh, ranks, checkpoints):
    folder = checkpoints("gemma2", **SHARP)
    options = LORA | {"target_modules": TARGETS}
    ours = ranks.run(capped_tasks.one_step, mesh, folder, options, BATCH)[0]
    model = transformers_model(folder)
    assert model.config.final_logit_softcapping == LOGIT_CAP
    check_one_step(ours, model, options)


@pytest.mark.parametrize("mesh", MESHES, ids=DeviceMesh.describe)
def test_an_adapter_on_a_head_with_a_cap_trains_as_in_peft(mesh, ranks, checkpoints):
    # Gemma's output layer is its embedding, which takes no adapter of its own: another family.
    folder = checkpoints("qwen3", **SHARP, final_logit_softcapping=LOGIT_CAP)
    options = LORA | {"target_modules": ["q_proj", "lm_head"]}
    ours = ranks.run(capped_tasks.one_step, mesh, folder, options, BATCH)[0]
    model = hf_model(folder)
    model.register_forward_hook(cap_of)
    check_one_step(ours, model, options)


@pytest.mark.parametrize("family", ["gemma2", "gemma4"])
@pytest.mark.parametrize("cap", [30.0, None])
def test_caps_as_published_and_none_are_those_of_transformers(family, cap, ranks, checkpoints):
    folder = checkpoints(family, final_logit_softcapping=cap, initializer_range=0.2)
    actual = ranks.run(tasks.base_logps, DeviceMesh(tp=2), folder, BATCH)[0]
    expected = all_logps(transformers_model(folder), BATCH)
    assert largest_difference(actual, expected) <= TOLERANCE


def test_the_cap_of_these_models_is_felt(checkpoints):
    capped = all_logps(transformers_model(checkpoints("gemma2", **SHARP)), BATCH)
    free = checkpoints("gemma2", **SHARP, final_logit_softcapping=None)
    assert largest_difference(capped, all_logps(transformers_model(free), BATCH)) > 0.1


def test_a_model_trained_as_a_whole_under_capped_logits_is_transformers(
    ranks, checkpoints, tmp_path
):
    # A row of padding is all zeros, and Transformers lets no gradient of the input change it.
    folder = checkpoints("gemma2", **SHARP, pad_token_id=None)
    args = (folder, [BATCH], str(tmp_path))
    report = ranks.run(full_tasks.train_everything, DeviceMesh(tp=2), *args)[0]
    model = transformers_model(folder).train()
    losses = train(model, list(model.parameters()), [BATCH])
    assert report["losses"] == pytest.approx(losses, abs=TOLERANCE)
    assert largest_difference(report["logps"], all_logps(model.eval(), BATCH)) <= TOLERANCE


def test_another_converter_which_would_lose_the_cap_is_refused(ranks, checkpoints):
    folder = checkpoints("gemma2", **SHARP)
    error = ranks.run(capped_tasks.error_of_another_converter, DeviceMesh(), folder)[0]
    assert error is not None
    assert "ConfigError" in error[0]
    assert "soft-capped logits need bridge='megatron-bridge'" in error[1]
