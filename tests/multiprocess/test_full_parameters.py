"""A model trained as a whole is what Transformers trains, on every layout, and is saved as such."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatrain.parallel.layout import DeviceMesh
from tests.fixtures import quantized_files
from tests.multiprocess import full_tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.truth import all_logps, hf_model, largest_difference, train

pytestmark = [pytest.mark.multiprocess, pytest.mark.api]

BATCHES = [random_batch(5, seed=seed) for seed in range(2)]
TOLERANCE = 1e-5
"""Float32 sums in another order; two steps at lr 1e-4 move log-probabilities by 1e-2."""

LAYOUTS = [
    DeviceMesh(),
    DeviceMesh(tp=2),
    DeviceMesh(pp=2),
    DeviceMesh(cp=2),
    DeviceMesh(dp=2),
    DeviceMesh(tp=2, pp=2),
]
CASES = [
    *(("qwen3", mesh) for mesh in LAYOUTS),
    *(("qwen3_tied", mesh) for mesh in LAYOUTS),
    ("qwen2", DeviceMesh(tp=2)),
    ("qwen3_moe", DeviceMesh()),
    ("qwen3_moe", DeviceMesh(tp=2, ep=2)),
    ("qwen3_moe", DeviceMesh(dp=2, pp=2, ep=2)),
]


@pytest.fixture(scope="module")
def trained_by_transformers(checkpoints):
    """Return (model, losses) for a family, trained once."""
    done = {}

    def trained(family: str):
        if family not in done:
            model = hf_model(checkpoints(family)).train()
            done[family] = model, train(model, list(model.parameters()), BATCHES)
        return done[family]

    return trained


@pytest.mark.parametrize(
    ("family", "mesh"), CASES, ids=[f"{f}-{m.describe().replace('·', '-')}" for f, m in CASES]
)
def test_every_parameter_is_trained_as_transformers_does(
    family, mesh, ranks, checkpoints, trained_by_transformers, tmp_path
):
    model, losses = trained_by_transformers(family)
    report = ranks.run(
        full_tasks.train_everything, mesh, checkpoints(family), BATCHES, str(tmp_path)
    )[0]
    assert report["losses"] == pytest.approx(losses, abs=TOLERANCE)
    assert largest_difference(report["logps"], all_logps(model.eval(), BATCHES[0])) <= TOLERANCE
    assert "all parameters" in report["config"]

    saved = Path(report["saved"])
    reloaded = type(model).from_pretrained(saved, dtype=torch.float32).eval()
    assert largest_difference(report["logps"], all_logps(reloaded, BATCHES[0])) <= TOLERANCE
    written = {}
    for shard in saved.glob("*.safetensors"):
        written |= load_file(shard)
    assert written.keys() == report["tensors"].keys()
    assert all(torch.equal(written[name], value) for name, value in report["tensors"].items())


def test_an_adapter_is_refused_beside_a_base_that_is_trained(ranks, checkpoints):
    kinds, text = ranks.run(
        full_tasks.refuses_adapter_beside_base, DeviceMesh(), checkpoints("qwen3")
    )[0]
    assert "StateError" in kinds
    assert "base itself is being trained" in text


@pytest.mark.parametrize(
    ("family", "quantize", "reason"),
    [
        ("qwen3", functools.partial(quantized_files.fp8_blocks, block=(16, 16)), "quantised"),
        ("qwen3_vl", None, "Qwen3VLTextTowerForCausalLM is a part of its checkpoint"),
        ("gpt_oss", None, "cannot be written back yet"),
    ],
    ids=["quantised", "text-tower", "gpt-oss"],
)
def test_a_base_that_cannot_be_saved_is_not_trained_as_a_whole(
    family, quantize, reason, ranks, checkpoints, tmp_path
):
    folder = checkpoints(family)
    if quantize is not None:
        folder = quantize(folder, tmp_path / "quantised")
    whole, adapter = ranks.run(full_tasks.optimizer_errors, DeviceMesh(), folder)[0]
    assert "ConfigError" in whole[0]
    assert reason in whole[1]
    assert "add_adapter_to_model" in whole[1]
    assert adapter is None
