"""A template whose tokens are the bytes of a chat's contents, so that lengths are chosen freely."""

from collections.abc import Mapping
from typing import Any

from megatrain.data.template.base import Template
from megatrain.errors import DataError


class ByteTemplate(Template):
    """Encodes the bytes of all contents; the assistant's are labels."""

    def __init__(self, max_length: int | None = None, truncation_strategy: str = "raise") -> None:
        self.max_length, self.truncation_strategy = max_length, truncation_strategy

    def encode(
        self, row: Mapping[str, Any], add_generation_prompt: bool = False
    ) -> dict[str, Any] | None:
        """Return the row with its tokens; None for a long one with "delete"."""
        if "messages" not in row:
            raise DataError(f"a row needs messages; it has {sorted(row)}")
        ids: list[int] = []
        labels: list[int] = []
        for message in row["messages"]:
            if message["role"] not in ("system", "user", "assistant"):
                raise DataError(f"unknown role {message['role']!r}")
            content = list(message["content"].encode())
            ids += content
            trained = message["role"] == "assistant" and not add_generation_prompt
            labels += content if trained else [-100] * len(content)
        if self.max_length is not None and len(ids) > self.max_length:
            if self.truncation_strategy == "delete":
                return None
            raise DataError(f"{len(ids)} tokens are more than max_length {self.max_length}")
        return {**row, "input_ids": ids, "labels": labels}
