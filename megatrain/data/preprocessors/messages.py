"""Conversations as lists: OpenAI's role/content, ShareGPT's from/value, or names of one's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatrain.data.preprocessors.base import Preprocessor, Row, need
from megatrain.errors import DataError

ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's and others' names of roles."""

COLUMNS = ("messages", "conversations", "conversation")


class MessagesProcessor(Preprocessor):
    """{"messages" or "conversations"} -> {"messages"}.

    column: the list's column; None: the first of messages, conversations, conversation.
    roles: more names of roles, such as {"bard": "assistant"}; "human", "gpt" and so on are known.
    A column "system" becomes the first message; "tools" and "user_data" are kept.
    """

    def __init__(self, column: str | None = None, roles: Mapping[str, str] | None = None) -> None:
        self.column = column
        self.roles = {**ROLES, **(roles or {})}

    def __call__(self, row: Row) -> dict[str, Any]:
        column = self.column or next((name for name in COLUMNS if row.get(name)), COLUMNS[0])
        (turns,) = need(row, column, who=self)
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise DataError(f"{column} must be a list of messages, not {str(turns)[:60]!r}")
        messages = [self.message(index, turn) for index, turn in enumerate(turns)]
        if row.get("system") and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": row["system"]})
        kept = {name: row[name] for name in ("tools", "user_data") if row.get(name) is not None}
        return {"messages": messages, **kept}

    def message(self, index: int, turn: Any) -> dict[str, Any]:
        """Return one turn with role and content; its other keys are kept."""
        if not isinstance(turn, Mapping):
            raise DataError(f"message {index} must be a mapping, not {str(turn)[:60]!r}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role is None:
            keys = ", ".join(sorted(map(str, turn)))
            raise DataError(f"message {index} has no role (or from); it has {keys}")
        used = ("role", "from", "content", "value")
        more = {key: value for key, value in turn.items() if key not in used and value is not None}
        return {"role": self.roles.get(role, role), "content": content, **more}
