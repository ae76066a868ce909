"""The Countdown game: an equation that reaches the target with each number once."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from megatrain.rl.arithmetic import evaluate
from megatrain.rl.reward import CompletionReward

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.S)


class CountdownReward(CompletionReward):
    """1 if the last `<answer>` is an expression of user_data's `nums`, each once, worth `target`.

    What follows an equals sign is not looked at.  Source of the game: TinyZero.
    """

    def score(self, completion: str, truth: Mapping[str, Any]) -> float:
        """Return 1 or 0.  The value is exact: no rounding makes a near miss right."""
        answers = _ANSWER.findall(completion)
        target, numbers = _task(truth)
        found = evaluate(answers[-1].split("=")[0]) if answers else None
        if found is None or not numbers:
            return 0.0
        value, used = found
        return float(value == target and sorted(used) == numbers)


def _task(truth: Mapping[str, Any]) -> tuple[Fraction | None, list[int]]:
    """Return target and sorted numbers; no numbers if the row has no task."""
    try:
        numbers = sorted(int(number) for number in truth.get("nums") or ())
        return Fraction(str(truth.get("target"))), numbers
    except (TypeError, ValueError, ZeroDivisionError):
        return None, []
