"""Reward models learn the same on every layout, and Transformers gives their scores."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import loss_tasks

pytestmark = [pytest.mark.multiprocess, pytest.mark.api]

TOLERANCE = 1e-5
"""float32; sums over ranks come in another order."""


@pytest.mark.parametrize(
    ("mesh", "lora"),
    [
        (DeviceMesh(tp=2), None),
        (DeviceMesh(cp=2), None),
        (DeviceMesh(pp=2, dp=2), None),
        (DeviceMesh(tp=2, pp=2), {}),
        (DeviceMesh(cp=2), {}),
        (DeviceMesh(dp=2, fsdp=2), {}),
    ],
    ids=lambda value: value.describe().replace("·", "-") if value else "full" * (value == {}),
)
def test_a_reward_model_learns_the_same_on_every_layout(mesh, lora, ranks, checkpoints):
    scores, losses, accuracies, state = ranks.run(
        loss_tasks.reward_report, None, checkpoints("qwen3"), 6, lora, 3
    )[0]
    assert losses[-1] < losses[0]
    assert accuracies[-1] > accuracies[0]
    assert state["score.weight"].shape == (1, 64)
    mine = ranks.run(loss_tasks.reward_report, mesh, checkpoints("qwen3"), 6, lora, 3)[0]
    assert mine[3].keys() == state.keys()
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


@pytest.mark.parametrize("mesh", [None, DeviceMesh(tp=2, pp=2)], ids=["1", "tp2-pp2"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "qwen3_moe"])
def test_a_whole_reward_model_is_one_of_transformers(family, mesh, ranks, checkpoints, tmp_path):
    folder = checkpoints(family)
    scores = ranks.run(loss_tasks.saved_reward_model, mesh, folder, str(tmp_path), {})[0]
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_labels == 1
    with torch.no_grad():
        theirs = [
            float(model.eval()(torch.tensor([datum["input_ids"]])).logits)
            for datum in loss_tasks.pairs()
        ]
    assert scores == pytest.approx(theirs, abs=TOLERANCE)
