"""Rewards and lengths of sampled completions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatrain.rl.metric import Metric


class CompletionRewardMetric(Metric):
    """Mean and standard deviation (n - 1) of each reward, and lengths of completions."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._rewards: dict[str, list[float]] = {}
        self._lengths: list[int] = []
        self._seconds: dict[str, list[float]] = {}

    def accumulate(
        self,
        inputs: Any = None,
        outputs: Any = None,
        *,
        rewards: Mapping[str, Sequence[float | None]] | None = None,
        completion_lengths: Sequence[int] = (),
        generate_time: float | None = None,
        weight_sync_time: float | None = None,
    ) -> None:
        """Add completions: rewards by name, lengths in tokens, and seconds of the sampler."""
        for name, scores in (rewards or {}).items():
            numbers = (np.nan if score is None else float(score) for score in scores)
            self._rewards.setdefault(name, []).extend(numbers)
        self._lengths.extend(int(length) for length in completion_lengths)
        for name, seconds in (("generate", generate_time), ("weight_sync", weight_sync_time)):
            if seconds is not None:
                self._seconds.setdefault(name, []).append(seconds)

    def calculate(self) -> dict[str, float]:
        """Return train/NAME_reward, train/NAME_reward_std, train/completion_length and so on.

        Scores of None or NaN, for completions that could not be scored, are left out.
        """
        result: dict[str, float] = {}
        for name, scores in self._rewards.items():
            known = np.array(scores)[np.isfinite(scores)]
            if known.size:
                result[f"train/{name}_reward"] = float(known.mean())
                spread = known.std(ddof=1) if known.size > 1 else 0.0
                result[f"train/{name}_reward_std"] = float(spread)
        if self._lengths:
            result["train/completion_length"] = float(np.mean(self._lengths))
            result["train/completion_length_max"] = float(max(self._lengths))
        for name, seconds in self._seconds.items():
            result[f"profiling/{name}_seconds"] = float(np.mean(seconds))
        return result
