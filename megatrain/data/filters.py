"""Filters: which rows of a data set are kept."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatrain.data.template.messages import BESIDE_CONTENT
from megatrain.errors import ConfigError, DataError

Row = Mapping[str, Any]

CONTENT = ("messages", "chosen", "rejected", "text")
"""Columns of a standard row that hold what is trained on."""


class Filter(ABC):
    """Called with each row; a function of the row and the filter's options alone."""

    @abstractmethod
    def __call__(self, row: Row) -> bool:
        """Tell whether the row is kept."""


class EmptyFilter(Filter):
    """Keeps standard rows that have words: text that is not blank, and an answer to learn from.

    A conversation needs a message of the assistant, and each must have content, tool calls or
    thinking unless it has "loss": false; a prompt, for `prompts=True`, needs a last message with
    content.
    """

    def __init__(self, prompts: bool = False) -> None:
        self.prompts = prompts

    def __call__(self, row: Row) -> bool:
        values = [row[name] for name in _content_columns(row)]
        return all(
            bool(value.strip()) if isinstance(value, str) else self._has_words(value or ())
            for value in values
        )

    def _has_words(self, messages: Sequence[Row]) -> bool:
        if self.prompts:
            return bool(messages) and _says(messages[-1])
        answers = [message for message in messages if message.get("role") == "assistant"]
        asked = [message for message in answers if message.get("loss") is not False]
        return bool(answers) and all(map(_says, asked))


class LengthFilter(Filter):
    """Keeps rows with minimum <= length <= maximum: tokens if encoded, characters before.

    For an encoded row, length is its column "length"; for a standard row, the characters of all
    its contents, of the longer side for a pair.
    """

    def __init__(self, maximum: int | None = None, minimum: int = 1) -> None:
        if maximum is not None and maximum < minimum:
            raise ConfigError(f"maximum {maximum} is below minimum {minimum}: no row would be left")
        self.maximum = maximum
        self.minimum = minimum

    def __call__(self, row: Row) -> bool:
        length = row["length"] if "length" in row else _characters(row)
        return length >= self.minimum and (self.maximum is None or length <= self.maximum)


def _content_columns(row: Row) -> list[str]:
    columns = [name for name in CONTENT if name in row]
    if not columns:
        raise DataError(
            f"a filter needs one of the columns {', '.join(CONTENT)}; the row has "
            f"{', '.join(sorted(row))}",
            hint="map a preprocessor before you filter",
        )
    return columns


def _says(message: Row) -> bool:
    return bool("".join(_texts(message)).strip()) or any(map(message.get, BESIDE_CONTENT))


def _characters(row: Row) -> int:
    return max(
        len(value) if isinstance(value, str) else sum(map(_message_length, value or ()))
        for value in (row[name] for name in _content_columns(row))
    )


def _message_length(message: Row) -> int:
    return sum(map(len, _texts(message)))


def _texts(message: Row) -> Iterator[str]:
    content = message.get("content") or ""
    if isinstance(content, str):
        yield content
    else:
        yield from (part.get("text") or "" for part in content)
