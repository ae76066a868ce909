"""Tool calls within a text: `<tool_call>{json}</tool_call>`, as Hermes and Qwen write them."""

import json
import re
import uuid
from typing import Any

OPENING = "<tool_call>"

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def split_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the text without its calls, and the calls in OpenAI's shape.

    A call that is no JSON object with a name and arguments stays in the text as it was written.
    """
    calls: list[dict[str, Any]] = []

    def taken(match: re.Match[str]) -> str:
        call = _parse(match.group(1))
        if call is None:
            return match.group(0)
        calls.append(call)
        return ""

    rest = _CALL.sub(taken, text)
    return (rest.strip() if calls else text), calls


def _parse(written: str) -> dict[str, Any] | None:
    try:
        said = json.loads(written)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return None
    arguments = said.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": said["name"], "arguments": arguments},
    }
