"""GRPO against TRL's GRPOTrainer, in value and gradient, in float64."""

import pytest
import torch

from megatrain.errors import ConfigError
from megatrain.train.losses.grpo import GRPOLoss
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


def near(rows, seed, scale=0.4):
    noise = ragged(LENGTHS, seed=seed, scale=scale)
    return [[x + d for x, d in zip(*each, strict=True)] for each in zip(rows, noise, strict=True)]


OLD, REFERENCE = near(POLICY, 1), near(POLICY, 2)
ADVANTAGES = [1.5, -0.5, 0.0, -1.0, 0.7, -0.3]


def trl_inputs(advantages, **rows):
    """Advantages one a sequence, or rows of them; other inputs as rows."""
    of_labels = isinstance(advantages[0], list)
    given = padded(advantages)[0] if of_labels else torch.tensor(advantages, dtype=torch.float64)
    return {"advantages": given, **{name: padded(value)[0] for name, value in rows.items()}}


def ours(advantages, **rows):
    if not isinstance(advantages[0], list):
        advantages = [[a] * n for a, n in zip(advantages, LENGTHS, strict=True)]
    return make_batch(POLICY, advantages=advantages, **rows)


OPTIONS = [
    {},
    {"epsilon": 0.1, "epsilon_high": 0.28},
    {"delta": 1.3},
    {"epsilon": 0.1, "beta": 0.04},
    {"epsilon": 0.1, "importance_sampling_level": "sequence"},
    {"importance_sampling_level": "sequence", "beta": 0.1, "epsilon_high": 0.3, "delta": 1.31},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_value_and_gradient_are_trl_s(loss_type, options):
    options = {**options, "loss_type": loss_type}
    if loss_type == "dr_grpo":
        options["max_completion_length"] = 16
    given = trl_inputs(ADVANTAGES, old_per_token_logps=OLD, ref_per_token_logps=REFERENCE)
    theirs = reference_value_and_gradient(
        lambda logps: trl.grpo(logps, LENGTHS, given, **options)[0], POLICY
    )
    rows = {"old_logps": OLD} | ({"ref_logps": REFERENCE} if "beta" in options else {})
    assert_same(value_and_gradient(GRPOLoss(**options), ours(ADVANTAGES, **rows)), theirs)


def test_without_old_logps_the_batch_is_on_policy_as_in_trl():
    theirs = reference_value_and_gradient(
        lambda logps: trl.grpo(logps, LENGTHS, trl_inputs(ADVANTAGES), loss_type="dapo")[0], POLICY
    )
    assert_same(value_and_gradient(GRPOLoss(), ours(ADVANTAGES)), theirs)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_advantages_may_be_one_a_label(loss_type):
    advantages = ragged(LENGTHS, seed=5)
    given = trl_inputs(advantages, old_per_token_logps=OLD)
    theirs = reference_value_and_gradient(
        lambda logps: trl.grpo(logps, LENGTHS, given, loss_type=loss_type)[0], POLICY
    )
    batch = ours(advantages, old_logps=OLD)
    assert_same(value_and_gradient(GRPOLoss(loss_type=loss_type), batch), theirs)


def test_statistics_are_trl_s():
    given = trl_inputs(ADVANTAGES, old_per_token_logps=OLD, ref_per_token_logps=REFERENCE)
    options = {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.2, "beta": 0.1}
    _, metrics = trl.grpo(padded(POLICY)[0], LENGTHS, given, **options)
    found = report(GRPOLoss(**options), ours(ADVANTAGES, old_logps=OLD, ref_logps=REFERENCE))
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "kl"):
        # TRL's averages are in float32.
        assert found[name] == pytest.approx(metrics[name], rel=1e-6), name
        assert found[name] > 0


def test_dual_clip_is_the_paper_s():
    """Ye et al. 2020, equation 5: max(min(r A, clip(r) A), c A) where A < 0, on its own here."""
    delta, advantage = 3.0, -1.0
    for ratio in (0.5, 1.1, 2.0, 5.0, 40.0):
        batch = make_batch(
            [[float(torch.tensor(ratio, dtype=torch.float64).log())]],
            old_logps=[[0.0]],
            advantages=[[advantage]],
        )
        clipped = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        total, _ = GRPOLoss(delta=delta)(batch)
        assert float(total.detach()) == pytest.approx(-max(clipped, delta * advantage))


def test_a_label_without_advantage_stays_finite_however_far_the_policy_went():
    batch = make_batch(
        [[-1.0, -1.0]], dtype=torch.float32, old_logps=[[-200.0, -1.0]], advantages=[[0.0, 1.0]]
    )
    total, _ = GRPOLoss()(batch)
    (gradient,) = torch.autograd.grad(total, batch.logps_N)
    assert gradient.tolist() == [0.0, -1.0]


def test_inputs_and_statistics_follow_the_options():
    assert GRPOLoss().inputs["old_logps"].required is False
    assert "ref_logps" not in GRPOLoss().inputs
    assert GRPOLoss(beta=0.1).inputs["ref_logps"].required
    assert "kl" not in GRPOLoss().statistics
    assert "kl" in GRPOLoss(beta=0.1).statistics


def test_divisors_are_of_the_global_batch():
    assert GRPOLoss().divisor(LENGTHS) == sum(LENGTHS)
    assert GRPOLoss(loss_type="grpo").divisor(LENGTHS) == len(LENGTHS)
    dr_grpo = GRPOLoss(loss_type="dr_grpo", max_completion_length=100)
    assert dr_grpo.divisor(LENGTHS) == 100 * len(LENGTHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be at least 0"),
        ({"epsilon": "0.2"}, "epsilon must be a finite number"),
        ({"epsilon_high": float("nan")}, "epsilon_high must be a finite number"),
        ({"delta": 1.2}, "delta must be above 1.2"),
        ({"beta": -1}, "beta must be at least 0"),
        ({"loss_type": "gropo"}, "did you mean 'grpo'"),
        ({"loss_type": "dr_grpo"}, "go together"),
        ({"max_completion_length": 10}, "go together"),
        ({"importance_sampling_level": "tokens"}, "did you mean 'token'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GRPOLoss(**options)
