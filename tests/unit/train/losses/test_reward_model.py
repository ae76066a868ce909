"""Bradley-Terry on scores against TRL's RewardTrainer, in value and gradient, in float64."""

import pytest
import torch

from megatrain.errors import ConfigError, StateError
from megatrain.train.loss import LossBatch
from megatrain.train.losses.reward_model import RewardModelLoss
from tests.unit.train.losses import trl
from tests.unit.train.losses.batches import make_batch, report

SCORES = [0.3, -1.2, 2.0, 2.5, -0.7, -0.1, 4.0, -3.0]
MARGINS = [0.5, 9.0, 0.0, 9.0, 1.5, 9.0, 0.2, 9.0]
"""Of each datum: those of rejected answers do not count."""


def make(scores, **inputs):
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in inputs.items()}
    nothing = torch.zeros(0, dtype=torch.int64)
    return LossBatch(torch.zeros(0), nothing, len(scores), given, scores_S=scores)


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_value_and_gradient_are_trl_s(coefficient, with_margin):
    ours = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    theirs = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    loss = RewardModelLoss(center_rewards_coefficient=coefficient)
    total, _ = loss(make(ours, **({"margin": MARGINS} if with_margin else {})))
    margin_P = torch.tensor(MARGINS[0::2], dtype=torch.float64) if with_margin else None
    expected, _ = trl.reward(theirs, margin_P, coefficient or None)
    value = total / loss.divisor([5] * len(SCORES))
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-12)


def test_statistics_are_trl_s():
    scores = torch.tensor(SCORES, dtype=torch.float64)
    _, metrics = trl.reward(scores, None, None)
    found = report(RewardModelLoss(), make(scores))
    assert found == pytest.approx({name: metrics[name] for name in found}, rel=1e-6)
    assert found["accuracy"] == 0.5


def test_a_model_without_scores_is_refused():
    with pytest.raises(StateError, match="score head"):
        RewardModelLoss()(make_batch([[-1.0], [-1.0]]))


def test_a_negative_regulariser_is_refused():
    with pytest.raises(ConfigError, match="center_rewards_coefficient must be at least 0"):
        RewardModelLoss(center_rewards_coefficient=-0.1)
