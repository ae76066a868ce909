"""Importance sampling, PPO, CISPO, DRO, GSPO: against the formulas, label by label in float64."""

import math

import pytest
import torch

from megatrain.train.losses.gspo import GSPOLoss
from megatrain.train.losses.policy import CISPOLoss, DROLoss, ImportanceSamplingLoss, PPOLoss
from tests.unit.train.losses.batches import log_probabilities, make_batch, ragged, report

LENGTHS = [3, 7, 1, 5]
POLICY = log_probabilities(LENGTHS, seed=0)
OLD = [
    [x + d for x, d in zip(*rows, strict=True)]
    for rows in zip(POLICY, ragged(LENGTHS, seed=1, scale=0.4), strict=True)
]
ADVANTAGES = ragged(LENGTHS, seed=2)


def each_label():
    return [
        (p, q, a)
        for rows in zip(POLICY, OLD, ADVANTAGES, strict=True)
        for p, q, a in zip(*rows, strict=True)
    ]


def importance_sampling_by_hand(p, q, a):
    ratio = math.exp(p - q)
    return -ratio * a, -ratio * a


def ppo_by_hand(p, q, a, low, high):
    ratio = math.exp(p - q)
    clipped = min(max(ratio, low), high)
    if ratio * a <= clipped * a:
        return -ratio * a, -ratio * a
    return -clipped * a, 0.0


def cispo_by_hand(p, q, a, low, high):
    weight = min(max(math.exp(p - q), low), high)
    return -weight * p * a, -weight * a


def dro_by_hand(p, q, a, beta):
    return -(p * a - 0.5 * beta * (p - q) ** 2), -(a - beta * (p - q))


@pytest.mark.parametrize(
    ("loss", "by_hand", "options"),
    [
        (ImportanceSamplingLoss(), importance_sampling_by_hand, {}),
        (PPOLoss(), ppo_by_hand, {"low": 0.8, "high": 1.2}),
        (
            PPOLoss(clip_low_threshold=0.9, clip_high_threshold=1.5),
            ppo_by_hand,
            {"low": 0.9, "high": 1.5},
        ),
        (CISPOLoss(), cispo_by_hand, {"low": 0.0, "high": 4.0}),
        (
            CISPOLoss(clip_low_threshold=0.8, clip_high_threshold=1.2),
            cispo_by_hand,
            {"low": 0.8, "high": 1.2},
        ),
        (DROLoss(), dro_by_hand, {"beta": 0.05}),
        (DROLoss(beta=2.0), dro_by_hand, {"beta": 2.0}),
    ],
)
def test_the_sum_and_its_gradient_are_the_formula_s(loss, by_hand, options):
    batch = make_batch(POLICY, old_logps=OLD, advantages=ADVANTAGES)
    total, _ = loss(batch)
    (gradient,) = torch.autograd.grad(total, batch.logps_N)
    expected = [by_hand(*label, **options) for label in each_label()]
    assert float(total.detach()) == pytest.approx(math.fsum(v for v, _ in expected), rel=1e-6)
    assert gradient.tolist() == pytest.approx([g for _, g in expected], rel=1e-6)


def gspo_by_hand(rows, mask, low, high):
    """Return the sum and the gradient of each label: s is a number, not a function of p."""
    total, gradient = 0.0, []
    for policy, old, advantages, kept in zip(*rows, mask, strict=True):
        gaps = [p - q for p, q, m in zip(policy, old, kept, strict=True) if m]
        ratio = math.exp(sum(gaps) / max(len(gaps), 1))
        for a in advantages:
            clipped = min(max(ratio, low), high)
            total -= min(ratio * a, clipped * a)
            gradient.append(-ratio * a if ratio * a <= clipped * a else 0.0)
    return total, gradient


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bounds", [(0.8, 1.2), (1 - 3e-4, 1 + 4e-4)])
def test_gspo_is_the_formula_s(masked, bounds):
    low, high = bounds
    mask = [[float(masked is False or i % 2 == 0) for i in range(n)] for n in LENGTHS]
    given = {"sequence_ratio_mask": mask} if masked else {}
    batch = make_batch(POLICY, old_logps=OLD, advantages=ADVANTAGES, **given)
    total, _ = GSPOLoss(clip_low_threshold=low, clip_high_threshold=high)(batch)
    (gradient,) = torch.autograd.grad(total, batch.logps_N)
    value, expected = gspo_by_hand((POLICY, OLD, ADVANTAGES), mask, low, high)
    assert float(total.detach()) == pytest.approx(value, rel=1e-6)
    assert gradient.tolist() == pytest.approx(expected, rel=1e-6)


def test_gspo_s_bounds_are_the_paper_s_by_default():
    loss = GSPOLoss()
    assert (loss.clip_low_threshold, loss.clip_high_threshold) == (1 - 3e-4, 1 + 4e-4)


@pytest.mark.parametrize("kind", [PPOLoss, CISPOLoss, GSPOLoss])
def test_bounds_may_come_with_the_call_label_by_label(kind):
    low, high = (0.6, 0.9), (1.1, 1.7)
    options = {"clip_low_threshold": low[0], "clip_high_threshold": high[0]}
    others = {"clip_low_threshold": low[1], "clip_high_threshold": high[1]}
    given = {"old_logps": OLD, "advantages": ADVANTAGES}
    expected = sum(
        loss(make_batch(POLICY[part], **{k: v[part] for k, v in given.items()}))[0]
        for loss, part in ((kind(**options), slice(0, 2)), (kind(**others), slice(2, 4)))
    )
    own = {
        name: [[options[name]] * n for n in LENGTHS[:2]] + [[others[name]] * n for n in LENGTHS[2:]]
        for name in options
    }
    total, _ = kind(**options)(make_batch(POLICY, **given, **own))
    torch.testing.assert_close(total, expected)
    alone, _ = kind(**options)(make_batch(POLICY, **given))
    assert not torch.isclose(alone, expected)


@pytest.mark.parametrize("kind", [ImportanceSamplingLoss, PPOLoss, CISPOLoss, GSPOLoss])
def test_a_label_without_advantage_may_have_any_old_logp(kind):
    policy, advantages = [[-0.5, -200.0, -1.0]], [[1.0, 0.0, -1.0]]
    batch = make_batch(
        policy,
        dtype=torch.float32,
        old_logps=[[-0.6, -1e30, -0.9]],
        advantages=advantages,
        **({"sequence_ratio_mask": [[1.0, 0.0, 1.0]]} if kind is GSPOLoss else {}),
    )
    total, statistics = kind()(batch)
    (gradient,) = torch.autograd.grad(total, batch.logps_N)
    assert torch.isfinite(total)
    assert torch.isfinite(gradient).all()
    assert gradient[1] == 0
    assert all(math.isfinite(float(sum_)) for sum_, _ in statistics.values())


def test_on_policy_importance_sampling_has_the_gradient_of_reinforce():
    batch = make_batch(POLICY, old_logps=POLICY, advantages=ADVANTAGES)
    total, _ = ImportanceSamplingLoss()(batch)
    (gradient,) = torch.autograd.grad(total, batch.logps_N)
    torch.testing.assert_close(gradient, -batch.inputs["advantages"])


def test_statistics_of_ppo_count_what_the_clip_holds_back():
    ratios, advantages = [0.5, 1.0, 3.0, 3.0, 0.5, 2.0], [-1.0, 1.0, 1.0, -1.0, 1.0, 0.0]
    batch = make_batch(
        [[math.log(r) for r in ratios]], old_logps=[[0.0] * 6], advantages=[advantages]
    )
    found = report(PPOLoss(), batch)
    assert found["clip_ratio/low_mean"] == pytest.approx(1 / 5)
    assert found["clip_ratio/high_mean"] == pytest.approx(1 / 5)
    assert found["clip_ratio/region_mean"] == pytest.approx(2 / 5)
    assert found["ratio/mean"] == pytest.approx(sum(ratios[:5]) / 5)
    assert found["approx_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios[:5]) / 5)
    both_signs = report(CISPOLoss(clip_low_threshold=0.8, clip_high_threshold=1.2), batch)
    assert both_signs["clip_ratio/region_mean"] == pytest.approx(4 / 5)
