"""Advantages from the other completions of the same prompt: GRPO and RLOO."""

from typing import Any, Literal, get_args

import numpy as np

from megatrain.errors import ConfigError
from megatrain.rl.advantage import (
    EPSILON,
    Advantage,
    Array,
    Order,
    groups,
    mean,
    need_pairs,
    reward_array,
    std,
    ungroup,
)

Scale = Literal["group", "batch", "none"]


class GRPOAdvantage(Advantage):
    """Reward minus the mean of its group, over a standard deviation.

    Source: Shao et al., arXiv:2402.03300, equation 21; `batch` and `none` as TRL's scale_rewards
    (Dr. GRPO, arXiv:2503.20783, is `none`).
    """

    def __call__(
        self,
        rewards: Any,
        num_generations: int,
        scale: Scale = "group",
        order: Order = "consecutive",
    ) -> Array:
        """Return advantages, float64 (N,), for N rewards of N / num_generations prompts.

        A reward of None or NaN is left out of the statistics; its advantage is 0, and so is that
        of a group whose rewards are all the same.  Raises ConfigError or DataError.
        """
        if scale not in get_args(Scale):
            raise ConfigError(f"scale must be one of {', '.join(get_args(Scale))}: {scale!r}")
        need_pairs(num_generations, "GRPO")
        grouped = groups(reward_array(rewards), num_generations, order)
        result = grouped - mean(grouped, axis=1)
        if scale != "none":
            spread = std(grouped, axis=1) if scale == "group" else std(grouped)
            result = result / (spread + EPSILON)
        return ungroup(np.nan_to_num(result), order)


class RLOOAdvantage(Advantage):
    """Reward minus the mean reward of the other completions of the prompt (leave one out).

    Source: Ahmadian et al., arXiv:2402.14740; `normalize` as TRL's normalize_advantages.
    """

    def __init__(self, *, normalize: bool = False) -> None:
        self.normalize = normalize

    def __call__(self, rewards: Any, num_generations: int, order: Order = "consecutive") -> Array:
        """Return advantages, float64 (N,).  None and NaN as in GRPO.  ConfigError, DataError."""
        need_pairs(num_generations, "RLOO")
        grouped = groups(reward_array(rewards), num_generations, order)
        count = np.isfinite(grouped).sum(axis=1, keepdims=True)
        # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
        factor = np.where(count > 1, count / np.maximum(count - 1, 1), np.nan)
        result = (grouped - mean(grouped, axis=1)) * factor
        if self.normalize:
            result = (result - mean(result)) / (std(result) + EPSILON)
        return ungroup(np.nan_to_num(result), order)
