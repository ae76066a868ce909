"""DPO and its family, SimPO, ORPO, MPO: against TRL, in value and gradient, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatrain.errors import ConfigError
from megatrain.train.losses.dpo import LOSS_TYPES, DPOLoss
from megatrain.train.losses.mpo import MPOLoss
from megatrain.train.losses.orpo import ORPOLoss, log1mexp
from megatrain.train.losses.simpo import SimPOLoss
from tests.unit.train.losses import trl
from tests.unit.train.losses.batches import (
    assert_same,
    log_probabilities,
    make_batch,
    padded,
    ragged,
    reference_value_and_gradient,
    report,
    value_and_gradient,
)

LENGTHS = [3, 7, 1, 5, 4, 2]
POLICY = log_probabilities(LENGTHS, seed=0)
REFERENCE = [
    [x + d for x, d in zip(*rows, strict=True)]
    for rows in zip(POLICY, ragged(LENGTHS, seed=1, scale=0.4), strict=True)
]
SAME_LENGTHS = [4, 6, 4, 1, 4, 3]
"""Chosen answers of one length: TRL's mean over all their labels is the mean of their means."""
LENGTH_B = torch.tensor(LENGTHS, dtype=torch.float64)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_dpo_is_trl_s(loss_type, beta):
    smoothing = {"robust": 0.2, "exo_pair": 0.1}.get(loss_type, 0.0)
    options = {"beta": beta, "label_smoothing": smoothing}
    ref_BT, _ = padded(REFERENCE)
    theirs = reference_value_and_gradient(
        lambda logps: trl.dpo(logps, LENGTHS, ref_BT, loss_types=[loss_type], **options)[0], POLICY
    )
    loss = DPOLoss(loss_type=loss_type, **options)
    assert_same(value_and_gradient(loss, make_batch(POLICY, ref_logps=REFERENCE)), theirs)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_reference_free_is_a_reference_of_zeros(loss_type):
    zeros, _ = padded([[0.0] * n for n in LENGTHS])
    theirs = reference_value_and_gradient(
        lambda logps: trl.dpo(logps, LENGTHS, zeros, beta=0.3, loss_types=[loss_type])[0], POLICY
    )
    loss = DPOLoss(loss_type=loss_type, beta=0.3, reference_free=True)
    assert loss.inputs == {}
    assert_same(value_and_gradient(loss, make_batch(POLICY)), theirs)


def test_smoothed_dpo_is_the_mean_over_labels_right_and_wrong():
    """Mitchell 2023, "cDPO", equation 3: TRL's sigmoid has no smoothing, its AOT and CPO have."""
    smoothing, beta = 0.2, 0.5

    def by_hand(logps):
        total = logps.new_zeros(())
        for i in range(0, len(LENGTHS), 2):
            ratio = [
                sum(logps[j, t] - REFERENCE[j][t] for t in range(LENGTHS[j])) for j in (i, i + 1)
            ]
            right = torch.sigmoid(beta * (ratio[0] - ratio[1]))
            total = total - (1 - smoothing) * right.log() - smoothing * (1 - right).log()
        return total / (len(LENGTHS) // 2)

    loss = DPOLoss(beta=beta, label_smoothing=smoothing)
    batch = make_batch(POLICY, ref_logps=REFERENCE)
    assert_same(value_and_gradient(loss, batch), reference_value_and_gradient(by_hand, POLICY))


def test_the_likelihood_of_chosen_answers_is_trl_s_sft_loss():
    policy, reference = log_probabilities(SAME_LENGTHS, seed=3), ragged(SAME_LENGTHS, seed=4)
    ref_BT, _ = padded(reference)
    options = {"beta": 0.2, "loss_types": ["sigmoid", "sft"], "weights": [1.0, 0.7]}
    theirs = reference_value_and_gradient(
        lambda logps: trl.dpo(logps, SAME_LENGTHS, ref_BT, **options)[0], policy
    )
    loss = DPOLoss(beta=0.2, sft_weight=0.7)
    assert_same(value_and_gradient(loss, make_batch(policy, ref_logps=reference)), theirs)


def test_statistics_are_trl_s():
    _, metrics = trl.dpo(
        padded(POLICY)[0], LENGTHS, padded(REFERENCE)[0], beta=0.1, loss_types=["sigmoid"]
    )
    found = report(DPOLoss(), make_batch(POLICY, ref_logps=REFERENCE))
    # Statistics are float32 sums.
    assert found == pytest.approx({name: metrics[name] for name in found}, rel=1e-5)


def test_the_first_gradient_of_dpo_is_half_of_beta():
    """At policy = reference sigma(0) = 1/2: -beta/2 on every chosen label, beta/2 on the others."""
    batch = make_batch(POLICY, ref_logps=POLICY)
    value, gradient = value_and_gradient(DPOLoss(beta=0.1), batch)
    assert float(value) == pytest.approx(math.log(2))
    for i, row in enumerate(gradient):
        assert row == pytest.approx([(-0.05 if i % 2 == 0 else 0.05) / 3] * LENGTHS[i])


def test_mpo_is_trl_s_mixture():
    policy, reference = log_probabilities(SAME_LENGTHS, seed=3), ragged(SAME_LENGTHS, seed=4)
    ref_BT, _ = padded(reference)
    options = {"loss_types": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0]}
    theirs = reference_value_and_gradient(
        lambda logps: trl.dpo(logps, SAME_LENGTHS, ref_BT, beta=0.1, **options)[0], policy
    )
    assert_same(value_and_gradient(MPOLoss(), make_batch(policy, ref_logps=reference)), theirs)


def test_mpo_s_reward_shift_moves_the_threshold_of_quality():
    """Equations 4 to 6 of the paper, with the generation term of each answer's own length."""
    shift, beta = 0.3, 0.2

    def by_hand(logps):
        total = logps.new_zeros(())
        for i in range(0, len(LENGTHS), 2):
            good, bad = (
                beta * sum(logps[j, t] - REFERENCE[j][t] for t in range(LENGTHS[j]))
                for j in (i, i + 1)
            )
            total = total - 0.5 * torch.sigmoid(good - bad).log()
            total = total - 0.25 * torch.sigmoid(good - shift).log()
            total = total - 0.25 * torch.sigmoid(-(bad - shift)).log()
            total = total - 2.0 * logps[i, : LENGTHS[i]].mean()
        return total / (len(LENGTHS) // 2)

    loss = MPOLoss(
        beta=beta,
        preference_weight=0.5,
        quality_weight=0.25,
        generation_weight=2.0,
        reward_shift=shift,
    )
    batch = make_batch(POLICY, ref_logps=REFERENCE)
    assert_same(value_and_gradient(loss, batch), reference_value_and_gradient(by_hand, POLICY))


def means(logps_BT):
    mean_B = (logps_BT * padded(POLICY)[1]).sum(1) / LENGTH_B
    return mean_B[0::2], mean_B[1::2]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_is_trl_s(smoothing):
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        beta=2.5,
        simpo_gamma=1.4,
        label_smoothing=smoothing,
        accelerator=trl.OneProcess(),
    )
    theirs = reference_value_and_gradient(
        lambda logps: trl.CPOTrainer.cpo_loss(trainer, *means(logps))[0].mean(), POLICY
    )
    loss = SimPOLoss(beta=2.5, gamma=1.4, label_smoothing=smoothing)
    assert_same(value_and_gradient(loss, make_batch(POLICY)), theirs)
    _, chosen, rejected = trl.CPOTrainer.cpo_loss(trainer, *means(padded(POLICY)[0]))
    found = report(loss, make_batch(POLICY))
    assert found["rewards/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-5)
    assert found["rewards/margins"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-5)


def test_orpo_s_odds_ratio_is_trl_s():
    trainer = SimpleNamespace(beta=0.25, accelerator=trl.OneProcess())
    losses, chosen, _, ratio, odds = trl.ORPOTrainer.odds_ratio_loss(
        trainer, *means(padded(POLICY)[0])
    )
    batch = make_batch(POLICY)
    loss = ORPOLoss(beta=0.25)
    value, _ = value_and_gradient(loss, batch)
    found = report(loss, batch)
    # TRL computes the odds in float32.
    assert float(value) == pytest.approx(float(-chosen.mean() / 0.25 - losses.mean()), rel=1e-5)
    assert found["log_odds_ratio"] == pytest.approx(float(ratio), rel=1e-5)
    assert found["log_odds_chosen"] == pytest.approx(float(odds), rel=1e-5)
    assert found["nll_loss"] == pytest.approx(float(-chosen.mean() / 0.25), rel=1e-5)


def test_orpo_s_gradient_is_that_of_the_paper_s_odds():
    """Equations 3 to 7: odds(y) = P / (1 - P) with P = exp(mean log p), written out."""

    def by_hand(logps):
        total = logps.new_zeros(())
        for i in range(0, len(LENGTHS), 2):
            p = [torch.exp(logps[j, : LENGTHS[j]].mean()) for j in (i, i + 1)]
            odds = [each / (1 - each) for each in p]
            total = total - p[0].log() - 0.25 * torch.sigmoid((odds[0] / odds[1]).log()).log()
        return total / (len(LENGTHS) // 2)

    theirs = reference_value_and_gradient(by_hand, POLICY)
    assert_same(value_and_gradient(ORPOLoss(beta=0.25), make_batch(POLICY)), theirs)


def test_a_certain_answer_leaves_orpo_finite():
    batch = make_batch([[0.0, 0.0], [-2.0]], dtype=torch.float32)
    value, gradient = value_and_gradient(ORPOLoss(), batch)
    assert math.isfinite(value)
    assert all(math.isfinite(g) for row in gradient for g in row)


def test_log1mexp_is_exact_on_both_sides_of_its_branch():
    log_p = [-1e-6, -0.01, -0.69, -0.7, -3.0, -30.0]
    found = log1mexp(torch.tensor(log_p, dtype=torch.float64)).tolist()
    # expm1 and log1p of the C library, branch by branch the other way round.
    assert found == pytest.approx([math.log(-math.expm1(x)) for x in log_p], rel=1e-9)


@pytest.mark.parametrize("kind", [DPOLoss, SimPOLoss, ORPOLoss, MPOLoss])
def test_pairs_stay_together_and_are_what_is_averaged(kind):
    assert kind().unit == 2
    assert kind().divisor(LENGTHS) == 3


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DPOLoss, {"beta": 0}, "beta must be above 0"),
        (DPOLoss, {"loss_type": "sigmoids"}, "did you mean 'sigmoid'"),
        (DPOLoss, {"loss_type": "aot"}, "loss_type must be one of"),
        (DPOLoss, {"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5"),
        (DPOLoss, {"loss_type": "ipo", "label_smoothing": 0.1}, "has no label smoothing"),
        (DPOLoss, {"loss_type": "exo_pair"}, "needs label_smoothing"),
        (DPOLoss, {"reference_free": "no"}, "reference_free must be True or False"),
        (SimPOLoss, {"gamma": -1}, "gamma must be at least 0"),
        (ORPOLoss, {"beta": True}, "beta must be a finite number"),
        (MPOLoss, {"quality_weight": -1}, "quality_weight must be at least 0"),
        (
            MPOLoss,
            {"preference_weight": 0, "quality_weight": 0, "generation_weight": 0},
            "must be above 0",
        ),
    ],
)
def test_options_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(**options)
