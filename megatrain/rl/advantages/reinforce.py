"""REINFORCE++: returns with a per-token KL penalty, normalised over the whole batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatrain.errors import DataError
from megatrain.rl.advantage import (
    Advantage,
    Array,
    Order,
    check_finite,
    float_array,
    groups,
    mean,
    per_datum,
    reward_array,
    token_counts,
)
from megatrain.rl.advantage import ungroup as in_order

SMALLEST_VARIANCE = 1e-8
"""A batch's variance counts as at least this, as in OpenRLHF."""

LARGEST_COEFFICIENT = 1e30
"""So that the square of a penalty is a finite number."""


class ReinforcePlusPlusAdvantage(Advantage):
    """Discounted returns minus their mean over the batch's tokens, over their standard deviation.

    Source: Hu et al., arXiv:2501.03262.  With several generations a prompt, the group's mean reward
    is taken off first (REINFORCE++-baseline).  The variance is over n, as in OpenRLHF.
    """

    def __init__(self, *, gamma: float = 1.0, kl_coef: float = 0.0) -> None:
        check_finite("gamma", gamma, 0, 1)
        check_finite("kl_coef", kl_coef, 0, LARGEST_COEFFICIENT)
        self.gamma, self.kl_coef = gamma, kl_coef

    def __call__(
        self,
        rewards: Any,
        num_generations: int = 1,
        *,
        kl: Sequence[Any] | None = None,
        lengths: Sequence[int] | None = None,
        order: Order = "consecutive",
    ) -> Any:
        """Return one advantage a completion, (N,); with `kl` or `lengths` a list of one a token.

        The reward stands at a completion's last token; `kl` (estimates of the KL divergence from
        the reference, a number a token) times kl_coef is taken off everywhere.  None and NaN as in
        GRPO.  Raises ConfigError or DataError.
        """
        scores = groups(reward_array(rewards), num_generations, order)
        if num_generations > 1:
            scores = scores - mean(scores, axis=1)
        flat = in_order(scores, order)
        if kl is None and self.kl_coef:
            raise DataError(f"kl_coef needs kl, a number for each token: kl_coef={self.kl_coef}")
        if kl is None and lengths is None:
            return _normalise([flat])[0]
        counts = token_counts(kl, "kl") if lengths is None else _lengths(lengths)
        if len(counts) != len(flat):
            raise DataError(f"kl and lengths need one for each of {len(flat)} data: {counts}")
        penalty = [np.zeros(n) for n in counts] if kl is None else per_datum(kl, "kl", counts)
        pairs = zip(flat, penalty, strict=True)
        return _normalise([self._returns(score, each) for score, each in pairs])

    def _returns(self, score: float, kl_T: Array) -> Array:
        """Return the discounted sum of what is still to come, for each token."""
        result = -self.kl_coef * kl_T
        result[-1] += score
        for t in reversed(range(len(result) - 1)):
            result[t] += self.gamma * result[t + 1]
        return result


def _lengths(lengths: Any) -> list[int]:
    array = float_array(lengths, "lengths")
    if array.ndim != 1 or not array.size or (array % 1 != 0).any() or array.min() < 1:
        raise DataError(f"lengths must be whole numbers, a token at least of each: {lengths!r}")
    return [int(each) for each in array]


def _normalise(returns: list[Array]) -> list[Array]:
    values = np.concatenate(returns)
    values = values[np.isfinite(values)]
    if not values.size:
        return [np.zeros_like(each) for each in returns]
    scale = np.sqrt(max(float(values.var()), SMALLEST_VARIANCE))
    return [np.nan_to_num((each - values.mean()) / scale) for each in returns]
