"""Preferences: pairs of answers (DPO and the like), or answers with a thumb up or down (KTO)."""

from typing import Any

from megatrain.data.preprocessors.base import Preprocessor, Row, need, with_system
from megatrain.data.preprocessors.messages import MessagesProcessor
from megatrain.errors import DataError


class PreferenceProcessor(Preprocessor):
    """{"prompt"?, "chosen", "rejected"} -> {"chosen", "rejected"}, conversations with the prompt.

    {"prompt"?, "completion", "label"} -> {"messages", "label"}.
    Each may be a text or a list of messages (role/content, or from/value); a column prompt may
    also be called question or instruction.  Without one, a side must be a whole conversation.
    `system` is put first where a row has no system message.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._messages = MessagesProcessor()

    def __call__(self, row: Row) -> dict[str, Any]:
        tools = {"tools": row["tools"]} if row.get("tools") is not None else {}
        if row.get("completion") is not None:
            completion, label = need(row, "completion", "label", who=self)
            if not isinstance(label, bool | int) or label not in (0, 1):
                raise DataError(f"label must be true or false, not {label!r}")
            messages = self._side(row, "completion", completion)
            return {"messages": messages, "label": bool(label), **tools}
        chosen, rejected = need(row, "chosen", "rejected", who=self)
        return {
            "chosen": self._side(row, "chosen", chosen),
            "rejected": self._side(row, "rejected", rejected),
            **tools,
        }

    def _side(self, row: Row, column: str, answer: Any) -> list[dict[str, Any]]:
        prompts = (row.get(name) for name in ("prompt", "question", "instruction"))
        prompt = self._read(next((value for value in prompts if value), []), "user")
        messages = self._read(answer, "assistant")
        if not prompt and (isinstance(answer, str) or len(messages) == 1):
            raise DataError(
                f"{column} is an answer alone, and there is no column prompt",
                hint="name the prompt's column prompt, question or instruction, or give each side "
                "as a list of messages with the prompt",
            )
        if messages[: len(prompt)] != prompt:  # else the answer repeats the prompt already
            messages = [*prompt, *messages]
        system = row.get("system") or self.system
        return messages if messages[0]["role"] == "system" else with_system(system, *messages)

    def _read(self, value: Any, role: str) -> list[dict[str, Any]]:
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        turns = [value] if isinstance(value, dict) else value
        return [self._messages.message(index, turn) for index, turn in enumerate(turns)]
