"""Whether a completion's final answer is the true one: as a number where it is one, or as text."""

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from megatrain.rl.reward import CompletionReward, last_tagged

TOLERANCE = Decimal("1e-5")
"""Two numbers closer than this, times the larger of them if that is below 1, are the same."""

MAX_CHARACTERS = 200
"""What follows `####` is looked for in as many characters."""

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_DOLLAR = r"(?:\\?\$)?\s*"
_NUMBER = re.compile(
    rf"([-+]?){_DOLLAR}([-+]?{_DIGITS}(?:[eE][-+]?\d{{1,3}})?)\s*(?:\\?%)?", re.ASCII
)
_NO_MORE = r"(?![\d,.]*\d|\s*[,/^*]\s*\d|[eE]\d)"  # "3, 4", "3/4" and "3e4" are not 3
_HASHED = re.compile(rf"\s*(-?){_DOLLAR}(-?{_DIGITS}){_NO_MORE}", re.ASCII)


class AccuracyReward(CompletionReward):
    """1 if the final answer is user_data's `ground_truth`.

    The final answer is the last of `\\boxed{...}`, `#### number` and `<answer>...</answer>`, in
    this order of preference; without any of them there is none.
    """

    def extract(self, completion: str) -> str:
        """Return the final answer; empty if there is none.  Subclass for another format."""
        tagged = last_tagged(completion, "answer")
        return boxed(completion) or hashed(completion) or (tagged or "").strip()

    def score(self, completion: str, truth: Mapping[str, Any]) -> float:
        """Return 1 or 0."""
        return float(same_answer(self.extract(completion), truth.get("ground_truth")))


class GSM8KAccuracyReward(AccuracyReward):
    """1 if the number in `\\boxed{...}` or after `####` is the true one (Cobbe et al., 2110.14168).

    The truth may be a whole solution of the data set: then what follows its `####` counts.
    """

    def extract(self, completion: str) -> str:
        """Return the number; empty if there is none."""
        return boxed(completion) or hashed(completion)

    def score(self, completion: str, truth: Mapping[str, Any]) -> float:
        """Return 1 or 0."""
        true = truth.get("ground_truth", truth.get("answer"))
        if isinstance(true, str):
            true = hashed(true) or true
        return float(same_answer(self.extract(completion), true))


class GSM8KFormatReward(CompletionReward):
    """1 if the completion ends in an answer that can be read: `\\boxed{...}` or `#### number`."""

    def score(self, completion: str, truth: Mapping[str, Any]) -> float:
        """Return 1 or 0."""
        return float(bool(boxed(completion) or hashed(completion)))


def hashed(text: str) -> str:
    """Return the last number after `####`; empty if there is none."""
    at = text.rfind("####")
    while at >= 0:
        found = _HASHED.match(text[at + 4 : at + 4 + MAX_CHARACTERS])
        if found:
            return (found[1] + found[2]).rstrip(".")
        at = text.rfind("####", 0, at)
    return ""


def boxed(text: str) -> str:
    """Return what the last `\\boxed{...}` holds, braces inside it included; empty if none ends."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            return text[start:position].strip()
    return ""


def same_answer(answer: str, truth: Any) -> bool:
    """Tell whether two answers are the same number or, where one is none, the same text."""
    if not answer or truth is None or isinstance(truth, bool):
        return False
    first, second = _number(answer), _number(str(truth))
    if first is not None and second is not None:
        return abs(first - second) <= TOLERANCE * min(Decimal(1), max(abs(first), abs(second)))
    return _plain(answer) == _plain(str(truth)) != ""


def _number(text: str) -> Decimal | None:
    """Return the number that `text` is: with commas between thousands, a dollar or percent sign."""
    found = _NUMBER.fullmatch(text.strip().replace("{,}", ","))
    if not found:
        return None
    try:
        value = Decimal((found[1] + found[2]).replace(",", ""))
    except InvalidOperation:  # two signs
        return None
    return value if value.is_finite() and abs(value.adjusted()) < 1000 else None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()
