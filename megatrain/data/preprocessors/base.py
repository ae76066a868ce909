"""Base class of preprocessors: one row of a data set in, one standard row out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from megatrain.errors import DataError

Row = Mapping[str, Any]


class Preprocessor(ABC):
    """Called with each row.  A standard row is one of

    - {"messages": [{"role", "content"}, ...]}, with "tools", and with "user_data": a list of one
      mapping with what a reward needs to know;
    - {"chosen": [...], "rejected": [...]}: two conversations that begin with the same prompt;
    - {"messages": [...], "label": bool}: an answer that is wanted, or not (KTO);
    - {"text": str}.

    A preprocessor must be a function of its row and its options alone: results are cached.
    """

    @abstractmethod
    def __call__(self, row: Row) -> dict[str, Any]:
        """Return the standard row, or raise DataError that says what is wrong with `row`."""


def need(row: Row, *columns: str, who: object) -> list[Any]:
    """Return the values of `columns`; DataError names those needed and those there are."""
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        present = sorted(column for column, value in row.items() if value is not None)
        raise DataError(
            f"{type(who).__name__} needs the columns {', '.join(columns)}; "
            f"the row has {', '.join(present) or 'none'}",
            hint="name your columns in the preprocessor's options, rename them, or choose another "
            "preprocessor",
        )
    return [row[column] for column in columns]


def need_words(column: str, answer: Any) -> None:
    """Raise DataError for an answer that is blank."""
    if isinstance(answer, str) and not answer.strip():
        raise DataError(
            f"{column} is an empty answer: {answer!r}",
            hint="leave such rows out with a filter before",
        )


def with_system(system: str | None, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `messages`, behind a system message if there is one."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *messages]


def user(content: str) -> dict[str, Any]:
    """Return a user's message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    """Return an assistant's message."""
    return {"role": "assistant", "content": content}
