"""Whether a completion's final answer is the true one: as a number where it is one, or as text."""

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from megatrain.rl.reward import CompletionReward

TOLERANCE = Decimal("1e-5")
"""Two numbers closer than this are the same answer."""

_HASHES = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.S)
_DECORATION = str.maketrans("", "", " ,$%\n\t")


class AccuracyReward(CompletionReward):
    """1 if the final answer is user_data's `ground_truth`.

    The final answer is the last of `\\boxed{...}`, `#### number` and `<answer>...</answer>`, in
    this order of preference; without any of them there is none.
    """

    def extract(self, completion: str) -> str:
        """Return the final answer; empty if there is none.  Subclass for another format."""
        tagged = _TAG.findall(completion)
        return boxed(completion) or hashed(completion) or (tagged[-1].strip() if tagged else "")

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
    found = _HASHES.findall(text)
    return found[-1] if found else ""


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
        return abs(first - second) < TOLERANCE
    return _plain(answer) == _plain(str(truth)) != ""


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text.translate(_DECORATION))
    except InvalidOperation:
        return None
    return value if value.is_finite() and abs(value.adjusted()) < 1000 else None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()
