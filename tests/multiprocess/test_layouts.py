"""Every layout gives what one rank gives, and what it saves is what PEFT computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.truth import (
    all_logps,
    largest_adapter_difference,
    largest_difference,
    peft_model,
    relative_difference,
)

pytestmark = pytest.mark.multiprocess

DENSE = [
    DeviceMesh(tp=2),
    DeviceMesh(tp=4),
    DeviceMesh(pp=2),
    DeviceMesh(pp=4),
    DeviceMesh(pp=2, vpp=2),
    DeviceMesh(cp=2),
    DeviceMesh(cp=4),
    DeviceMesh(dp=2),
    DeviceMesh(dp=2, tp=2),
    DeviceMesh(dp=2, cp=2),
    DeviceMesh(dp=2, pp=2, vpp=2),
    DeviceMesh(tp=2, pp=2),
    DeviceMesh(tp=2, cp=2),
    DeviceMesh(tp=2, pp=2, cp=2),
]
EXPERTS = [
    DeviceMesh(dp=2, ep=2),
    DeviceMesh(dp=4, ep=4),
    DeviceMesh(dp=4, ep=2),
    DeviceMesh(tp=2, ep=2),
    DeviceMesh(cp=2, ep=2),
    DeviceMesh(dp=2, pp=2, ep=2),
    DeviceMesh(tp=2, pp=2, ep=2),
    DeviceMesh(dp=2, tp=2, ep=2),
    DeviceMesh(tp=2, etp=2),
    DeviceMesh(dp=2, tp=2, ep=2, etp=2),
]
CASES = [
    pytest.param(family, mesh, id=f"{family}-{mesh.describe().replace('·', '-')}")
    for family, meshes in (("qwen3", DENSE), ("qwen3_moe", [*DENSE, *EXPERTS]))
    for mesh in meshes
]

TOLERANCE = 1e-5
"""Float32 sums in another order differ by 1e-6; a term that is lost or doubled by 1e-3 and more."""
BATCHES = [random_batch(6, seed=seed) for seed in range(3)]

Runs = Callable[[str, DeviceMesh], list[dict[str, Any]]]
parametrize = pytest.mark.parametrize(("family", "mesh"), CASES)


@pytest.fixture(scope="module")
def runs(ranks, checkpoints, tmp_path_factory) -> Runs:
    """Return what every rank reports on a layout; each layout is run once."""
    done: dict[tuple[str, DeviceMesh], Any] = {}

    def run(family: str, mesh: DeviceMesh) -> list[dict[str, Any]]:
        if (family, mesh) not in done:
            out = str(tmp_path_factory.mktemp("saved"))
            try:
                done[family, mesh] = ranks.run(
                    tasks.layout_report, mesh, checkpoints(family), BATCHES, out
                )
            except AssertionError as error:
                done[family, mesh] = error
        if isinstance(done[family, mesh], AssertionError):
            raise done[family, mesh]
        return done[family, mesh]

    return run


@parametrize
@pytest.mark.slow
def test_one_seed_gives_one_initial_adapter_bit_for_bit(family, mesh, runs):
    expected, actual = (runs(family, m)[0]["initial"] for m in (DeviceMesh(), mesh))
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


@parametrize
def test_log_probabilities_and_losses_are_those_of_one_rank(family, mesh, runs):
    expected, actual = (runs(family, m)[0] for m in (DeviceMesh(), mesh))
    assert largest_difference(actual["base"], expected["base"]) <= TOLERANCE
    for ours, theirs in zip(actual["logps"], expected["logps"], strict=True):
        assert largest_difference(ours, theirs) <= TOLERANCE
    assert actual["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)


@parametrize
def test_gradients_after_one_backward_are_those_of_one_rank(family, mesh, runs):
    expected, actual = (runs(family, m)[0] for m in (DeviceMesh(), mesh))
    assert relative_difference(actual["gradient"], expected["gradient"]) <= TOLERANCE
    assert actual["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)


@parametrize
def test_the_adapter_after_three_steps_is_that_of_one_rank(family, mesh, runs):
    expected, actual = (runs(family, m)[0] for m in (DeviceMesh(), mesh))
    assert largest_adapter_difference(actual["after_gradient"], expected["initial"]) == 0.0
    assert largest_adapter_difference(actual["adapter"], expected["adapter"]) <= TOLERANCE


@parametrize
def test_every_rank_returns_the_same(family, mesh, runs):
    first, *others = runs(family, mesh)
    for other in others:
        assert (other["losses"], other["norms"]) == (first["losses"], first["norms"])
        for ours, theirs in zip(other["logps"], first["logps"], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert other["adapter"] is None


@parametrize
def test_the_saved_adapter_gives_the_same_log_probabilities_in_peft(
    family, mesh, runs, checkpoints
):
    report = runs(family, mesh)[0]
    model = peft_model(checkpoints(family), Path(report["saved"]))
    assert largest_difference(report["logps"][-1], all_logps(model, BATCHES[0])) <= TOLERANCE


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_three_steps_move_every_factor_of_a_linear_that_saw_tokens(family, runs):
    report = runs(family, DeviceMesh())[0]
    still = [n for n, v in report["adapter"].items() if torch.equal(v, report["initial"][n])]
    assert still == []
