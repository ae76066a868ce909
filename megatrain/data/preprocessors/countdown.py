"""Countdown: reach a number by arithmetic on given ones, with TinyZero's prompt."""

from typing import Any

from megatrain.data.preprocessors.base import Preprocessor, Row, need, user, with_system
from megatrain.errors import DataError

SYSTEM = (
    "You are a helpful assistant. You first think about the reasoning process in the mind and then "
    "provide the user with the answer."
)
QUESTION = (
    "Using the numbers {nums}, create an equation that equals {target}. You can use basic "
    "arithmetic operations (+, -, *, /) and each number can only be used once. Show your work in "
    "<think> </think> tags. And return the final answer in <answer> </answer> tags, for example "
    "<answer> (1 + 2) / 3 </answer>."
)
"""Of github.com/Jiayi-Pan/TinyZero, examples/data_preprocess/countdown.py."""


class CountdownProcessor(Preprocessor):
    """{"nums", "target"} -> {"messages": a prompt, "user_data": [{"target", "nums"}]}.

    `system` replaces the system message (None: none).  The column may also be called "numbers",
    and the target "response", as in zouxuhong/Countdown-Tasks-3to4 on ModelScope.
    """

    def __init__(self, system: str | None = SYSTEM) -> None:
        self.system = system

    def __call__(self, row: Row) -> dict[str, Any]:
        numbers = "numbers" if row.get("nums") is None and "numbers" in row else "nums"
        goal = "response" if row.get("target") is None and "response" in row else "target"
        nums, target = need(row, numbers, goal, who=self)
        if isinstance(nums, str) or not all(isinstance(number, int) for number in nums):
            raise DataError(f"{numbers} must be a list of whole numbers, not {nums!r}")
        target, nums = int(target), list(nums)
        return {
            "messages": with_system(self.system, user(QUESTION.format(nums=nums, target=target))),
            "user_data": [{"target": target, "nums": nums}],
        }
