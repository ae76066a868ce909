"""Generalised advantage estimation: per-token advantages from rewards and a critic's values."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatrain.errors import DataError
from megatrain.rl.advantage import (
    EPSILON,
    Advantage,
    Array,
    check_finite,
    per_datum,
    token_counts,
)


def gae(
    rewards_T: Array,
    values_T: Array,
    *,
    gamma: float,
    lam: float,
    dones_T: Array | None = None,
    last_value: float = 0.0,
) -> tuple[Array, Array]:
    """Return advantages and returns, float64 (T,), of one sequence.

    A_t = sum_l (gamma lam)^l delta_{t+l} with delta_t = r_t + gamma V_{t+1} - V_t; return =
    advantage + value.  `dones_T[t]` ends an episode with token t.  `last_value` is the value after
    the last token: 0 where the sequence ended by itself.  Source: Schulman et al.,
    arXiv:1506.02438, equation 16.
    """
    advantages = np.zeros(len(values_T))
    following, running = last_value, 0.0
    for t in reversed(range(len(values_T))):
        goes_on = 1.0 if dones_T is None else 1.0 - float(dones_T[t])
        delta = rewards_T[t] + gamma * following * goes_on - values_T[t]
        running = delta + gamma * lam * goes_on * running
        advantages[t], following = running, values_T[t]
    return advantages, advantages + values_T


class GAEAdvantage(Advantage):
    """GAE over a batch; with `whiten`, mean 0 and standard deviation 1 over all its tokens."""

    def __init__(self, *, gamma: float = 1.0, lam: float = 0.95, whiten: bool = False) -> None:
        for name, value in (("gamma", gamma), ("lam", lam)):
            check_finite(name, value, 0, 1)
        self.gamma, self.lam, self.whiten = gamma, lam, whiten
        self.returns: list[Array] = []
        """Targets of the critic, one a token, of the last call: advantages before whitening plus
        values."""

    def __call__(
        self,
        rewards: Sequence[Any],
        values: Sequence[Sequence[float]],
        *,
        dones: Sequence[Sequence[bool]] | None = None,
        last_values: Sequence[float] | None = None,
    ) -> list[Array]:
        """Return advantages, a float64 array (T,) a datum.

        A datum's reward is a number, which then stands at its last token, or one a token, as its
        values are.  Raises DataError when the lengths differ or a number is not finite.
        """
        counts = token_counts(values, "values")
        per_token = per_datum(self._spread(rewards, counts), "rewards", counts)
        critic = per_datum(values, "values", counts)
        ends = per_datum(dones, "dones", counts) if dones is not None else [None] * len(counts)
        last = np.zeros(len(counts)) if last_values is None else last_values
        (after,) = per_datum([last], "last_values", [len(counts)])
        both = [
            gae(r, v, gamma=self.gamma, lam=self.lam, dones_T=d, last_value=float(a))
            for r, v, d, a in zip(per_token, critic, ends, after, strict=True)
        ]
        self.returns = [returns for _, returns in both]
        advantages = [each for each, _ in both]
        return _whiten(advantages) if self.whiten else advantages

    @staticmethod
    def _spread(rewards: Sequence[Any], counts: Sequence[int]) -> list[Any]:
        if not hasattr(rewards, "__len__") or len(rewards) != len(counts):
            raise DataError(f"as many rewards as values, {len(counts)}: {rewards!r}")
        return [
            r if hasattr(r, "__len__") and np.shape(r) != () else [*[0.0] * (n - 1), r]
            for r, n in zip(rewards, counts, strict=True)
        ]


def _whiten(advantages: list[Array]) -> list[Array]:
    values = np.concatenate(advantages)
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return [(each - values.mean()) / (spread + EPSILON) for each in advantages]
