"""Every loss gives one value and one gradient on every layout."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import loss_tasks

pytestmark = pytest.mark.multiprocess

LOSSES = [
    ("CrossEntropyLoss", {}, []),
    ("GRPOLoss", {"epsilon": 0.2, "beta": 0.04}, ["old_logps", "ref_logps", "advantages"]),
    ("GRPOLoss", {"loss_type": "dapo", "delta": 3.0}, ["old_logps", "advantages"]),
    ("PPOLoss", {}, ["old_logps", "advantages"]),
    ("GSPOLoss", {}, ["old_logps", "advantages"]),
    (
        "GRPOLoss",
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        ["old_logps", "advantages"],
    ),
    ("MPOLoss", {}, ["ref_logps"]),
    ("DPOLoss", {"beta": 0.1}, ["ref_logps"]),
    ("SimPOLoss", {}, []),
    ("ORPOLoss", {}, []),
    ("KTOLoss", {}, ["ref_logps", "label", "kl"]),
    ("DistillationLoss", {}, ["teacher_tokens", "teacher_logps"]),
]
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
def test_data_without_labels_count_alike_however_they_are_packed(mesh, ranks, checkpoints):
    folder = checkpoints("qwen3")
    alone = ranks.run(loss_tasks.hard_losses, None, folder, LOSSES)[0]
    expected = {name: values for name, *values in alone}
    for name, loss, statistics in ranks.run(loss_tasks.hard_losses, mesh, folder, LOSSES)[0]:
        if name != "GRPOLoss":  # twice in the list, with other options
            assert loss == pytest.approx(expected[name][0], abs=TOLERANCE), name
            # Sums of log-probabilities of about 100.
            assert statistics == pytest.approx(expected[name][1], abs=1e-4), name


@pytest.mark.parametrize(
    "mesh", [None, DeviceMesh(pp=2), DeviceMesh(cp=2)], ids=["1", "pp2", "cp2"]
)
def test_a_loss_that_fails_late_fails_everywhere_and_leaves_gradients(mesh, ranks, checkpoints):
    folder = checkpoints("qwen3")
    expected = ranks.run(loss_tasks.good_norm, mesh, folder)[0]
    for errors, norm in ranks.run(loss_tasks.bad_losses, mesh, folder):
        assert all(error is not None for error in errors.values()), errors
        assert norm == expected


@pytest.mark.parametrize(
    "mesh",
    [DeviceMesh(tp=2), DeviceMesh(cp=2), DeviceMesh(pp=2, dp=2)],
    ids=lambda mesh: mesh.describe().replace("·", "-"),
)
def test_a_reward_model_learns_the_same_on_every_layout(mesh, ranks, checkpoints):
    scores, losses, accuracies, state = ranks.run(
        loss_tasks.reward_report, None, checkpoints("qwen3"), 6
    )[0]
    assert losses[-1] < losses[0]
    assert accuracies[-1] > accuracies[0]
    assert state["score.weight"].shape == (1, 64)
    mine = ranks.run(loss_tasks.reward_report, mesh, checkpoints("qwen3"), 6)[0]
    for a, b in zip(mine[0], scores, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)
        assert np.count_nonzero(b) == 1  # at the last token
    assert mine[1] == pytest.approx(losses, abs=TOLERANCE)
    for name, tensor in state.items():
        # Relative L2: AdamW turns a gradient of about 0 into a step of either sign.
        assert (mine[3][name] - tensor).norm() <= TOLERANCE * tensor.norm()


@pytest.mark.filterwarnings("ignore:::peft")
def test_a_saved_reward_model_gives_its_scores_in_transformers_and_peft(
    ranks, checkpoints, tmp_path
):
    folder = checkpoints("qwen3")
    mesh = DeviceMesh(tp=2, pp=2)
    scores = ranks.run(loss_tasks.saved_reward_model, mesh, folder, str(tmp_path))[0]
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, str(tmp_path / "reward")).eval()
    with torch.no_grad():
        theirs = [
            float(model(torch.tensor([datum["input_ids"]])).logits) for datum in loss_tasks.pairs()
        ]
    assert scores == pytest.approx(theirs, abs=TOLERANCE)


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
