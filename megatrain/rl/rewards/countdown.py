"""The Countdown game: an equation that reaches the target with each number once."""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from megatrain.rl.arithmetic import evaluate
from megatrain.rl.reward import CompletionReward, last_tagged

_RATIONAL = re.compile(r"-?\d{1,100}(?:\.\d{1,100}|/0*[1-9]\d{0,99})?", re.ASCII)
"""A target given as text; an exponent could stand for a number of any size."""


class CountdownReward(CompletionReward):
    """1 if the last `<answer>` is an expression of user_data's `nums`, each once, worth `target`.

    What follows an equals sign is not looked at.  Source of the game: TinyZero.
    """

    def score(self, completion: str, truth: Mapping[str, Any]) -> float:
        """Return 1 or 0.  The value is exact: no rounding makes a near miss right."""
        answer = last_tagged(completion, "answer")
        target, numbers = _task(truth)
        found = evaluate(answer.partition("=")[0]) if answer else None
        if found is None or not numbers:
            return 0.0
        value, used = found
        return float(value == target and sorted(used) == numbers)


def _task(truth: Mapping[str, Any]) -> tuple[Fraction | None, list[int]]:
    """Return target and sorted numbers; no numbers if the row has no task."""
    target, given = _target(truth.get("target")), truth.get("nums")
    numbers = [_whole(each) for each in given] if isinstance(given, list | tuple) else []
    whole = [number for number in numbers if number is not None]
    return target, sorted(whole) if len(whole) == len(numbers) else []


def _target(value: Any) -> Fraction | None:
    if isinstance(value, str):
        return Fraction(value.strip()) if _RATIONAL.fullmatch(value.strip()) else None
    if isinstance(value, float):
        return Fraction(str(value)) if math.isfinite(value) else None
    return Fraction(value) if isinstance(value, int) else None


def _whole(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None
