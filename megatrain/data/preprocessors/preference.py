"""Preferences: pairs of answers (DPO and the like), or answers with a thumb up or down (KTO)."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatrain.data.preprocessors.base import Preprocessor, Row, need, need_words, with_system
from megatrain.data.preprocessors.messages import MessagesProcessor
from megatrain.data.template.messages import BESIDE_CONTENT
from megatrain.errors import DataError

PROMPTS = ("prompt", "question", "instruction")
"""Columns of prompts, the first that a row has."""


class PreferenceProcessor(Preprocessor):
    """{"prompt"?, "chosen", "rejected"} -> {"chosen", "rejected"}, conversations with the prompt.

    {"prompt"?, "completion", "label"} -> {"messages", "label"}.
    Each may be a text or a list of messages (role/content, or from/value); a column prompt may
    also be called question or instruction.  Without one, a side must be a whole conversation.
    With one, a side is what follows it, or a conversation that begins with it; system messages and
    white space at the ends do not count in this.
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
        name = next((name for name in PROMPTS if row.get(name)), PROMPTS[0])
        prompt = self._read(name, row.get(name) or [], "user")
        messages = self._read(column, answer, "assistant")
        if not prompt and (isinstance(answer, str) or len(messages) == 1):
            raise DataError(
                f"{column} is an answer alone, and there is no column prompt",
                hint="name the prompt's column prompt, question or instruction, or give each side "
                "as a list of messages with the prompt",
            )
        _check_last(column, messages)
        system, messages = _joined(column, prompt, messages)
        system = system or with_system(row.get("system") or self.system)
        return [*system, *messages]

    def _read(self, column: str, value: Any, role: str) -> list[dict[str, Any]]:
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        turns = [value] if isinstance(value, Mapping) else value
        if not isinstance(turns, Sequence):
            raise DataError(f"{column} must be a text or a list of messages, not {value!r}")
        return [self._messages.message(index, turn) for index, turn in enumerate(turns)]


def _joined(
    column: str, prompt: list[dict[str, Any]], messages: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the system message, if any, and the prompt once with what follows it."""
    asked_system, asked = _without_system(prompt)
    system, said = _without_system(messages)
    if system and asked_system and _plain(system[0]) != _plain(asked_system[0]):
        raise DataError(f"{column} has another system message than its prompt")
    if list(map(_plain, said[: len(asked)])) != list(map(_plain, asked)):
        if not said or said[0]["role"] not in ("assistant", "tool"):
            raise DataError(
                f"{column} is a conversation that does not begin with the prompt",
                hint="give the answer alone, or leave the column of prompts out",
            )
        said = [*asked, *said]
    return system or asked_system, said


def _check_last(column: str, messages: list[dict[str, Any]]) -> None:
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant":
        raise DataError(f"{column} does not end with a message of the assistant")
    if not any(map(last.get, BESIDE_CONTENT)):
        need_words(column, last["content"] or "")


def _without_system(
    messages: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    has_system = bool(messages) and messages[0]["role"] == "system"
    return messages[:has_system], messages[has_system:]


def _plain(message: Mapping[str, Any]) -> tuple[str, Any]:
    content = message["content"]
    return message["role"], content.strip() if isinstance(content, str) else content
