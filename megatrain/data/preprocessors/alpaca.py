"""Alpaca's instruction, input and output."""

from typing import Any

from megatrain.data.preprocessors.base import (
    Preprocessor,
    Row,
    assistant,
    need,
    need_words,
    user,
    with_system,
)


class AlpacaProcessor(Preprocessor):
    """{"instruction", "input"?, "output", "system"?, "history"?} -> {"messages"}.

    The input follows the instruction on a new line.  "history" holds earlier [question, answer]
    pairs, as in LLaMA-Factory.  `system` is used where a row has no system column.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system

    def __call__(self, row: Row) -> dict[str, Any]:
        instruction, output = need(row, "instruction", "output", who=self)
        need_words("output", output)
        question = "\n".join(part for part in (instruction, row.get("input")) if part)
        earlier = [
            message
            for asked, answered in row.get("history") or ()
            for message in (user(asked), assistant(answered))
        ]
        messages = with_system(row.get("system") or self.system, *earlier)
        return {"messages": [*messages, user(question), assistant(output)]}
