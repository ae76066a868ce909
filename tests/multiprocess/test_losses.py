"""Every loss gives one value and one gradient on every layout."""

import numpy as np
import pytest
import torch

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import loss_tasks
from tests.multiprocess.loss_cases import LOSSES

pytestmark = [pytest.mark.multiprocess, pytest.mark.api]

MESHES = [
    DeviceMesh(tp=2),
    DeviceMesh(pp=2),
    DeviceMesh(cp=2),
    DeviceMesh(dp=2),
    DeviceMesh(tp=2, cp=2),
    DeviceMesh(pp=2, cp=2),
    DeviceMesh(pp=2, dp=2),
]
TOLERANCE = 1e-5
"""float32; sums over ranks come in another order."""


@pytest.fixture(scope="module")
def alone(ranks, checkpoints):
    return ranks.run(loss_tasks.loss_reports, None, checkpoints("qwen3"), LOSSES)[0]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: mesh.describe().replace("·", "-"))
def test_every_loss_has_one_value_and_one_gradient_on_every_layout(mesh, alone, ranks, checkpoints):
    reports = ranks.run(loss_tasks.loss_reports, mesh, checkpoints("qwen3"), LOSSES)
    for rank, report in enumerate(reports):
        for (name, _, _), mine, expected in zip(LOSSES, report, alone, strict=True):
            assert mine[0] == pytest.approx(expected[0], abs=TOLERANCE), (name, rank)
            assert mine[1] == pytest.approx(expected[1], abs=TOLERANCE), (name, rank)
            if rank == 0:
                assert_gradients(mine[2], expected[2], name)


def assert_gradients(mine, expected, name):
    assert mine.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0, name
    for key, gradient in expected.items():
        torch.testing.assert_close(
            mine[key], gradient, rtol=0, atol=TOLERANCE * max(scale, 1.0), msg=f"{name} {key}"
        )


@pytest.mark.parametrize("mesh", [None, DeviceMesh(dp=4), DeviceMesh(dp=2, cp=2)], ids=str)
@pytest.mark.slow
def test_data_without_labels_count_alike_however_they_are_packed(mesh, ranks, checkpoints):
    folder = checkpoints("qwen3")
    alone = ranks.run(loss_tasks.hard_losses, None, folder, LOSSES)[0]
    found = ranks.run(loss_tasks.hard_losses, mesh, folder, LOSSES)[0]
    for case, mine, expected in zip(LOSSES, found, alone, strict=True):
        for loss, statistics in mine:
            assert loss == pytest.approx(expected[0][0], abs=TOLERANCE), case
            # Sums of log-probabilities of about 100.
            assert statistics == pytest.approx(expected[0][1], abs=1e-4), case


@pytest.mark.parametrize(
    "mesh", [None, DeviceMesh(pp=2), DeviceMesh(cp=2)], ids=["1", "pp2", "cp2"]
)
def test_a_loss_that_fails_late_fails_everywhere_and_leaves_gradients(mesh, ranks, checkpoints):
    folder = checkpoints("qwen3")
    expected = ranks.run(loss_tasks.good_norm, mesh, folder)[0]
    for errors, norm in ranks.run(loss_tasks.bad_losses, mesh, folder):
        assert all(error is not None for error in errors.values()), errors
        assert norm == expected


@pytest.mark.local_only
@pytest.mark.parametrize("mesh", [None, DeviceMesh(pp=2)], ids=["1", "pp2"])
def test_a_loss_that_fails_fails_on_every_rank_and_training_goes_on(mesh, ranks, checkpoints):
    reports = ranks.run(loss_tasks.failing_loss, mesh, checkpoints("qwen3"))
    for rank, (error, loss) in enumerate(reports):
        kinds, text = error
        if rank == len(reports) - 1:
            assert kinds[0] == "RuntimeError"
            assert "on purpose" in text
        else:
            assert kinds[0] == "StateError"
        assert np.isfinite(loss)
