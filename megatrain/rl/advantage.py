"""From rewards to advantages: the base class, and rewards as groups.  numpy, no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from megatrain.errors import ConfigError, DataError

Array = npt.NDArray[np.float64]
Order = Literal["consecutive", "interleaved"]

EPSILON = 1e-4
"""Added to a standard deviation before it divides, as in TRL."""


class Advantage(ABC):
    """How much better a completion, or a token, was than expected.  Subclass and define a call."""

    @abstractmethod
    def __call__(self, rewards: Any, *args: Any, **options: Any) -> Any:
        """Return an array with one advantage a completion, or a list of arrays with one a token."""


def reward_array(rewards: Any) -> Array:
    """Return rewards as float64 (N,); None and NaN, a completion that has no score, are NaN.

    Raises DataError unless there is at least one, in one dimension, and all scores are finite.
    """
    array = np.array(rewards, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise DataError(f"rewards must be a list with one number a completion: shape {array.shape}")
    if np.isinf(array).any():
        raise DataError(f"a reward must be finite: rewards[{int(np.isinf(array).argmax())}]")
    return array


def groups(rewards: Array, num_generations: int, order: Order) -> Array:
    """Return rewards as (prompts, generations).

    `consecutive`: all completions of a prompt in a row, as TRL and a sampler with num_samples > 1
    have them.  `interleaved`: prompts repeated as a whole list (`prompts * num_generations`).
    Raises ConfigError for an unknown order, DataError when groups are not whole.
    """
    if order not in get_args(Order):
        raise ConfigError(f"order must be one of {', '.join(get_args(Order))}: {order!r}")
    if num_generations < 1:
        raise ConfigError(f"num_generations must be at least 1: {num_generations}")
    if len(rewards) % num_generations:
        raise DataError(
            "the number of rewards must be a multiple of num_generations: "
            f"{len(rewards)} rewards, num_generations={num_generations}"
        )
    if order == "interleaved":
        return rewards.reshape(num_generations, -1).T
    return rewards.reshape(-1, num_generations)


def ungroup(grouped: Array, order: Order) -> Array:
    """Return (prompts, generations) in the order that the rewards came in."""
    return (grouped.T if order == "interleaved" else grouped).reshape(-1)


def need_pairs(num_generations: int, name: str) -> None:
    """Raise ConfigError unless there is something to compare a completion with."""
    if num_generations < 2:
        raise ConfigError(
            f"{name} compares the completions of one prompt: num_generations={num_generations}",
            hint="sample at least two completions of each prompt",
        )


def mean(values: Array, *, axis: int | None = None) -> Array:
    """Return the mean of the scores, NaN where there is none; `axis` is kept with size 1."""
    count = np.isfinite(values).sum(axis=axis, keepdims=True)
    total = np.where(np.isfinite(values), values, 0.0).sum(axis=axis, keepdims=True)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def std(values: Array, *, axis: int | None = None) -> Array:
    """Return the standard deviation (n - 1) of the scores, NaN below two; the axis is kept."""
    count = np.isfinite(values).sum(axis=axis, keepdims=True)
    centred = np.where(np.isfinite(values), values - mean(values, axis=axis), 0.0)
    variance = np.square(centred).sum(axis=axis, keepdims=True) / np.maximum(count - 1, 1)
    return np.asarray(np.where(count > 1, np.sqrt(variance), np.nan))


def per_datum(values: Sequence[Any], name: str, counts: Sequence[int]) -> list[Array]:
    """Return per-token numbers as arrays.  Raises DataError unless their lengths are `counts`."""
    arrays = [np.array(each, dtype=np.float64).reshape(-1) for each in values]
    found = [len(each) for each in arrays]
    if found != list(counts):
        raise DataError(
            f"{name} needs one number a token of each datum: {found} instead of {list(counts)}"
        )
    return arrays
