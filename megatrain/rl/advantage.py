"""From rewards to advantages: the base class, and rewards as groups.  numpy, no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from megatrain.errors import ConfigError, DataError

Array = npt.NDArray[np.float64]
Order = Literal["consecutive", "interleaved"]

LARGEST = 1e100
"""Sums of squares of larger numbers overflow."""

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
    array = float_array(rewards, "rewards")
    if array.ndim != 1 or not array.size:
        raise DataError(f"rewards must be a list with one number a completion: shape {array.shape}")
    _check_size(array, "rewards", np.abs(array) > LARGEST)
    return array


def float_array(values: Any, name: str) -> Array:
    """Return `values` as float64.  DataError if they are texts, too large, or lists of unlike
    lengths."""
    try:
        raw = np.asarray(values)
        if raw.dtype.kind in "USc" or (
            raw.dtype == object and any(isinstance(each, str | bytes) for each in raw.flat)
        ):
            raise ValueError("not numbers")
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name} must be numbers: {_short(values)} ({error})") from error


def _check_size(array: Array, name: str, bad: npt.NDArray[np.bool_]) -> None:
    if bad.any():
        at = int(bad.argmax())
        raise DataError(
            f"{name} must be finite, and {LARGEST:g} at most: {name}[{at}] is {array[at]}"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_finite(name: str, value: Any, lowest: float, highest: float) -> None:
    """Raise ConfigError unless the option is a number in these bounds."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not lowest <= float(value) <= highest
    ):
        raise ConfigError(f"{name} must be a number in [{lowest:g}, {highest:g}]: {value!r}")


def token_counts(values: Any, name: str) -> list[int]:
    """Return how many numbers each datum has.  DataError unless each is a list with one or more."""
    try:
        counts = [len(each) for each in values]
    except TypeError as error:
        raise DataError(f"{name} must be a list of lists of numbers: {_short(values)}") from error
    if not counts or not min(counts):
        raise DataError(f"{name} need a token at least of each datum: {counts}")
    return counts


def groups(rewards: Array, num_generations: int, order: Order) -> Array:
    """Return rewards as (prompts, generations).

    `consecutive`: all completions of a prompt in a row, as TRL and a sampler with num_samples > 1
    have them.  `interleaved`: prompts repeated as a whole list (`prompts * num_generations`).
    Raises ConfigError for an unknown order, DataError when groups are not whole.
    """
    if order not in get_args(Order):
        raise ConfigError(f"order must be one of {', '.join(get_args(Order))}: {order!r}")
    _check_count(num_generations)
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


def _check_count(num_generations: Any) -> None:
    whole = isinstance(num_generations, Integral) and not isinstance(num_generations, bool)
    if not whole or num_generations < 1:
        raise ConfigError(
            f"num_generations must be a whole number, at least 1: num_generations={num_generations}"
        )


def need_pairs(num_generations: int, name: str) -> None:
    """Raise ConfigError unless there is something to compare a completion with."""
    _check_count(num_generations)
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
    """Return per-token numbers as arrays.

    Raises DataError unless their lengths are `counts` and all are finite.
    """
    arrays = [float_array(each, f"{name}[{i}]").reshape(-1) for i, each in enumerate(values)]
    found = [len(each) for each in arrays]
    if found != list(counts):
        raise DataError(
            f"{name} needs one number a token of each datum: {found} instead of {list(counts)}"
        )
    for index, array in enumerate(arrays):
        _check_size(array, f"{name}[{index}]", ~(np.abs(array) <= LARGEST))
    return arrays
