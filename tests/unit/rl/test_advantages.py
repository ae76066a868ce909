"""Advantages beside TRL's formulas in torch, and float64 loops written from the papers."""

import numpy as np
import pytest
import torch
from trl.trainer.utils import nanstd

from megatrain.errors import ConfigError, DataError
from megatrain.rl.advantages import (
    GAEAdvantage,
    GRPOAdvantage,
    ReinforcePlusPlusAdvantage,
    RLOOAdvantage,
    gae,
)

REWARDS = [0.0, 1.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, -1.0, 0.25, 3.0, 0.0]

RTOL = 1e-6
"""TRL's nanstd makes n / (n - 1) in float32."""


def trl_grpo(rewards, num_generations, scale):
    """GRPOTrainer's lines (TRL 1.16, sum_then_normalize)."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    means = torch.nanmean(rewards.view(-1, num_generations), dim=1)
    means = means.repeat_interleave(num_generations, dim=0)
    if scale == "batch":
        std = nanstd(rewards).expand_as(rewards)
    else:
        std = nanstd(rewards.view(-1, num_generations), dim=1)
        std = std.repeat_interleave(num_generations, dim=0)
    advantages = rewards - means
    if scale != "none":
        advantages = advantages / (std + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0).numpy()


def trl_rloo(rewards, num_generations, normalize):
    """RLOOTrainer's lines (TRL 1.16)."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    grouped = rewards.view(-1, num_generations)
    counts = (~torch.isnan(grouped)).sum(dim=1, keepdim=True)
    baselines = (torch.nansum(grouped, dim=1, keepdim=True) - grouped) / (counts - 1)
    advantages = rewards - baselines.view(-1)
    if normalize:
        advantages = (advantages - torch.nanmean(advantages)) / (nanstd(advantages) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0).numpy()


@pytest.mark.parametrize("unscored", [[], [2], [0, 1, 2, 3]], ids=["all", "one", "a group"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_is_trls(scale, unscored):
    rewards = [float("nan") if i in unscored else r for i, r in enumerate(REWARDS)]
    found = GRPOAdvantage()(rewards, num_generations=4, scale=scale)
    np.testing.assert_allclose(found, trl_grpo(rewards, 4, scale), rtol=RTOL, atol=1e-12)
    assert isinstance(found.tolist()[0], float)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("unscored", [[], [2], [0, 1, 2]], ids=["all", "one", "three of a group"])
def test_rloo_is_trls(unscored, normalize):
    rewards = [float("nan") if i in unscored else r for i, r in enumerate(REWARDS)]
    found = RLOOAdvantage(normalize=normalize)(rewards, num_generations=4)
    np.testing.assert_allclose(found, trl_rloo(rewards, 4, normalize), rtol=RTOL, atol=1e-12)


def test_none_is_a_reward_that_is_not_known():
    found = GRPOAdvantage()([None, 1.0, 0.0, 2.0], num_generations=4)
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], GRPOAdvantage()([1.0, 0.0, 2.0], num_generations=3))


@pytest.mark.parametrize(
    "advantage", [GRPOAdvantage(), RLOOAdvantage(), ReinforcePlusPlusAdvantage()]
)
def test_interleaved_prompts_give_the_same_advantages_in_their_order(advantage):
    tiled = np.array(REWARDS).reshape(3, 4).T.reshape(-1).tolist()
    expected = np.array(advantage(REWARDS, num_generations=4)).reshape(3, 4).T.reshape(-1)
    found = advantage(tiled, num_generations=4, order="interleaved")
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert not np.allclose(advantage(tiled, num_generations=4), expected)


def test_equal_rewards_have_no_advantage():
    for scale in ("group", "batch", "none"):
        assert not GRPOAdvantage()([1.0] * 8, num_generations=4, scale=scale).any()
    assert not ReinforcePlusPlusAdvantage()([1.0] * 8).any()


def loop_reinforce(rewards, kl, lengths, gamma, kl_coef):
    """REINFORCE++ as OpenRLHF computes it: returns, then mean and variance over all tokens."""
    returns = []
    for reward, kl_T, length in zip(rewards, kl, lengths, strict=True):
        per_token = [
            -kl_coef * kl_T[t] + (reward if t == length - 1 else 0.0) for t in range(length)
        ]
        returns.append(
            [sum(gamma ** (s - t) * per_token[s] for s in range(t, length)) for t in range(length)]
        )
    flat = [value for each in returns for value in each]
    mean = sum(flat) / len(flat)
    variance = sum((value - mean) ** 2 for value in flat) / len(flat)
    return [[(value - mean) / max(variance, 1e-8) ** 0.5 for value in each] for each in returns]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus_is_the_loop_of_the_paper(gamma):
    rewards, lengths = [1.0, -0.5, 2.0], [3, 1, 4]
    draw = np.random.default_rng(0)
    kl = [draw.normal(size=n).tolist() for n in lengths]
    expected = loop_reinforce(rewards, kl, lengths, gamma, 0.1)
    found = ReinforcePlusPlusAdvantage(gamma=gamma, kl_coef=0.1)(rewards, kl=kl)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    without = ReinforcePlusPlusAdvantage(gamma=gamma)(rewards, lengths=lengths)
    expected = loop_reinforce(rewards, [[0.0] * n for n in lengths], lengths, gamma, 0.0)
    for one, other in zip(without, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_reinforce_plus_plus_takes_the_groups_mean_off_first():
    found = ReinforcePlusPlusAdvantage()(REWARDS, num_generations=4)
    centred = np.array(REWARDS).reshape(3, 4)
    centred = (centred - centred.mean(1, keepdims=True)).reshape(-1)
    np.testing.assert_allclose(found, centred / centred.std(), rtol=1e-9, atol=1e-12)


def loop_gae(rewards, values, dones, last_value, gamma, lam):
    """Equation 16 of arXiv:1506.02438 as a double sum; nothing goes past the end of an episode."""
    size = len(values)
    after = [*values[1:], last_value]
    deltas = [rewards[t] + (0.0 if dones[t] else gamma * after[t]) - values[t] for t in range(size)]
    result = []
    for t in range(size):
        total, factor = 0.0, 1.0
        for s in range(t, size):
            total += factor * deltas[s]
            if dones[s]:
                break
            factor *= gamma * lam
        result.append(total)
    return result


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_sum_of_the_paper(gamma, lam):
    draw = np.random.default_rng(1)
    rewards, values = draw.normal(size=9), draw.normal(size=9)
    dones = np.array([0, 0, 1, 0, 0, 0, 1, 0, 0], dtype=bool)
    found, returns = gae(
        rewards, values, gamma=gamma, lam=lam, dones_T=dones.astype(float), last_value=0.7
    )
    expected = loop_gae(rewards, values, dones, 0.7, gamma, lam)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(returns, found + values)


def test_gae_of_a_batch_puts_one_reward_at_the_last_token():
    advantage = GAEAdvantage(gamma=0.9, lam=0.8)
    values = [[0.1, 0.2, 0.3], [0.5]]
    one = advantage([1.0, -1.0], values)
    returns = advantage.returns
    other = advantage([[0.0, 0.0, 1.0], [-1.0]], values)
    for a, b, r, v in zip(one, other, returns, values, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(r, a + np.array(v))
    white = np.concatenate(GAEAdvantage(whiten=True)([1.0, -1.0], values))
    assert white.mean() == pytest.approx(0, abs=1e-12)
    assert white.std(ddof=1) == pytest.approx(1, abs=1e-3)  # the epsilon in the divisor


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GRPOAdvantage()([1.0] * 6, num_generations=4), DataError, "multiple"),
        (lambda: GRPOAdvantage()([1.0], num_generations=1), ConfigError, "num_generations=1"),
        (lambda: GRPOAdvantage()([], num_generations=2), DataError, "rewards"),
        (lambda: GRPOAdvantage()([[1.0, 2.0]], num_generations=2), DataError, "shape"),
        (lambda: GRPOAdvantage()([float("inf")] * 2, 2), DataError, "finite"),
        (lambda: GRPOAdvantage()([1.0, 2.0], 2, scale="groups"), ConfigError, "scale"),
        (lambda: GRPOAdvantage()([1.0, 2.0], 2, order="tiled"), ConfigError, "order"),
        (lambda: RLOOAdvantage()([1.0, 2.0], 0), ConfigError, "num_generations=0"),
        (lambda: ReinforcePlusPlusAdvantage(kl_coef=0.1)([1.0]), DataError, "kl"),
        (lambda: ReinforcePlusPlusAdvantage()([1.0], lengths=[0]), DataError, "token"),
        (lambda: ReinforcePlusPlusAdvantage(gamma=2.0), ConfigError, "gamma"),
        (lambda: GAEAdvantage(lam=-1.0), ConfigError, "lam"),
        (lambda: GAEAdvantage()([1.0], [[1.0], [2.0]]), DataError, "as many"),
        (lambda: GAEAdvantage()([[1.0, 2.0]], [[1.0]]), DataError, "rewards"),
        (lambda: GRPOAdvantage()("12", 2), DataError, "rewards must be numbers: '12'"),
        (lambda: GRPOAdvantage()(["1", "2"], 2), DataError, "rewards must be numbers: .'1', '2'"),
        (lambda: GRPOAdvantage()([None, "2"], 2), DataError, "rewards must be numbers: .None, '2'"),
        (lambda: GRPOAdvantage()([[1.0], [1.0, 2.0]], 2), DataError, "rewards must be numbers"),
        (lambda: GRPOAdvantage()(None, 2), DataError, "rewards"),
        (lambda: GRPOAdvantage()([10**400, 1], 2), DataError, "rewards must be numbers: .1000"),
        (lambda: GRPOAdvantage()([0, 1e300], 2), DataError, r"rewards\[1\] is 1e\+300"),
        (lambda: GRPOAdvantage()([1.0, 2.0], 2.0), ConfigError, "num_generations=2.0"),
        (lambda: RLOOAdvantage()([1.0, 2.0], None), ConfigError, "num_generations=None"),
        (lambda: RLOOAdvantage()([1.0, 2.0], float("nan")), ConfigError, "num_generations=nan"),
        (lambda: ReinforcePlusPlusAdvantage()([1.0], 1.0), ConfigError, "num_generations=1.0"),
        (lambda: ReinforcePlusPlusAdvantage(kl_coef=float("nan")), ConfigError, "kl_coef.*nan"),
        (lambda: ReinforcePlusPlusAdvantage(gamma=None), ConfigError, "gamma.*None"),
        (
            lambda: ReinforcePlusPlusAdvantage(kl_coef=0.1)([1.0], kl=[[0.1, float("nan")]]),
            DataError,
            r"kl\[0\]\[1\] is nan",
        ),
        (lambda: ReinforcePlusPlusAdvantage()([1.0], kl=[1.0]), DataError, "kl must be a list"),
        (lambda: ReinforcePlusPlusAdvantage()([1.0], lengths=[1.5]), DataError, "lengths.*1.5"),
        (lambda: ReinforcePlusPlusAdvantage()([1.0], lengths=["a"]), DataError, "lengths.*'a'"),
        (lambda: GAEAdvantage(gamma="1"), ConfigError, "gamma.*'1'"),
        (lambda: GAEAdvantage()([None], [[1.0]]), DataError, r"rewards\[0\]\[0\] is nan"),
        (lambda: GAEAdvantage()(["a"], [[1.0, 2.0]]), DataError, "rewards.*'a'"),
        (lambda: GAEAdvantage()(1.0, [[1.0]]), DataError, "as many"),
        (lambda: GAEAdvantage()([1.0], [1.0]), DataError, "values must be a list of lists"),
        (
            lambda: GAEAdvantage()([1.0], [[float("inf")]]),
            DataError,
            r"values\[0\]\[0\] is inf",
        ),
        (
            lambda: GAEAdvantage()([1.0], [[1.0]], last_values=[float("nan")]),
            DataError,
            r"last_values\[0\]\[0\] is nan",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
