"""GSM8K (Cobbe et al., 2021, arXiv:2110.14168): word problems with '#### 42' at the end."""

from typing import Any

from megatrain.data.preprocessors.base import Preprocessor, Row, need, user, with_system
from megatrain.errors import DataError

SYSTEM = (
    "You are a helpful math assistant. Reason step by step inside <think> </think>, then give the "
    "final answer, a number alone, as \\boxed{number}."
)


class GSM8KProcessor(Preprocessor):
    """{"question", "answer"} -> {"messages": a prompt, "user_data": [{"ground_truth": "42"}]}.

    The prompt asks for <think>...</think> and \\boxed{...}; `system` replaces it (None: none).
    The number behind the last '####' is the truth, without its thousands separators.
    """

    def __init__(self, system: str | None = SYSTEM) -> None:
        self.system = system

    def __call__(self, row: Row) -> dict[str, Any]:
        question, answer = need(row, "question", "answer", who=self)
        _, mark, truth = answer.rpartition("####")
        truth = truth.strip().replace(",", "")
        if not mark or not truth:
            raise DataError(f"answer does not end with '#### number': {answer[-60:]!r}")
        return {
            "messages": with_system(self.system, user(question)),
            "user_data": [{"ground_truth": truth}],
        }
