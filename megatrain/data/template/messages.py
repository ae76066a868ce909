"""Check a conversation before a template sees it, and undo what Arrow's tables do to it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Roles that chat templates of the field know."""

BESIDE_CONTENT = ("tool_calls", "reasoning_content", "thinking")
"""What an assistant may say without content."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as a template takes them, and what was asked of each message's loss."""

    messages: list[Message]
    loss: list[bool | None]
    """By message: its own "loss", or None to follow the template's `loss_on`."""
    tools: list[dict[str, Any]] | None

    def turns(self) -> list[int]:
        """Return the indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_conversation(messages: Any, tools: Any = None) -> Conversation:
    """Check `messages` and `tools`; DataError names the message.

    Keys whose value is None are left out, also inside tools and tool calls: a table has every key
    in every row.  A column of tools, or of tool_calls, may be JSON text instead.  Content in parts
    of type text becomes one text, which is what most chat templates take.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(
            f"messages must be a list with at least one message, not {_short(messages)}",
            hint="drop such rows with a filter, for example EmptyFilter",
        )
    cleaned = [_clean_message(index, message) for index, message in enumerate(messages)]
    for index, message in enumerate(cleaned):
        _check_answer(index, message)
    loss = [message.pop("loss", None) for message in cleaned]
    return Conversation(cleaned, loss, _clean_tools(tools))


def _clean_message(index: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"message {index} must be a mapping with role and content: {message!r}")
    cleaned: Message = {key: value for key, value in message.items() if value is not None}
    role = cleaned.get("role")
    if role not in ROLES:
        raise DataError(
            f"message {index} has the unknown role {role!r}; known: {', '.join(ROLES)}",
            hint="MessagesProcessor(roles={...}) maps roles and takes from/value columns",
        )
    if not isinstance(cleaned.get("loss", False), bool):
        raise DataError(f"message {index}: loss must be true or false, not {cleaned['loss']!r}")
    if "tool_calls" in cleaned:
        cleaned["tool_calls"] = _without_none(_from_json(cleaned["tool_calls"], index))
        if not cleaned["tool_calls"]:
            del cleaned["tool_calls"]
    _check_content(index, cleaned)
    return cleaned


def _check_content(index: int, message: Message) -> None:
    if "content" not in message:
        if "tool_calls" not in message:
            raise DataError(f"message {index} ({message['role']}) has no content")
        message["content"] = ""
    content = message["content"]
    if isinstance(content, str):
        return
    if not isinstance(content, Sequence):
        raise DataError(f"message {index}: content must be text, not {_short(content)}")
    message["content"] = "".join(_part_text(index, part) for part in content)


def _part_text(index: int, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        raise DataError(f"message {index}: only text can be trained on, not {_short(part)}")
    text = part.get("text")
    if not isinstance(text, str):
        raise DataError(f"message {index}: a part of type text has no text: {_short(part)}")
    return text


def _check_answer(index: int, message: Message) -> None:
    """Refuse an answer of nothing, which teaches a model to say nothing."""
    answers = message["role"] == "assistant" and message.get("loss") is not False
    if answers and not message["content"].strip() and not any(map(message.get, BESIDE_CONTENT)):
        raise DataError(
            f"message {index} is an empty answer of the assistant",
            hint='leave such rows out with EmptyFilter, or give the message "loss": false',
        )


def _clean_tools(tools: Any) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    read = _from_json(tools, None)
    if isinstance(read, Sequence):
        read = [_from_json(tool, None) for tool in read]
    if not isinstance(read, list) or not all(isinstance(tool, Mapping) for tool in read):
        raise DataError(f"tools must be a list of JSON schemas, not {_short(tools)}")
    cleaned: list[dict[str, Any]] = _without_none(read)
    return cleaned or None


def _from_json(value: Any, index: int | None) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        where = "tools" if index is None else f"message {index}: tool_calls"
        raise DataError(f"{where}: not JSON ({error}): {_short(value)}") from error


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
