"""What `datasets` calls for each batch of rows: it runs one function a row and names bad rows."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatrain.data.origin import ROW, Origins
from megatrain.data.rows import JSON, is_empty, read_batch, to_json
from megatrain.errors import DataError, MegatrainError

logger = logging.getLogger(__name__)

ON_ERROR = ("raise", "skip")

ROW_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError)
"""What a function raises for a row that is not what it expects."""

NUM_REASONS = 3
"""Rows left out that are named in the log."""

SKIP = (
    "or leave such rows out: on_error='skip' of Dataset(...) or of a run's [data], "
    "--skip-bad-rows of megatrain data stats"
)
"""The other way out of a bad row, wherever it is met."""


class LeftOut:
    """Counts the rows that a step leaves out, and keeps the first reasons.

    A step that runs in other processes counts there; then the number alone is known.
    """

    def __init__(self, call: str) -> None:
        self.call = call
        self._count = 0
        self._reasons: list[str] = []

    def add(self, reason: str) -> None:
        """Count a row."""
        self._count += 1
        if len(self._reasons) < NUM_REASONS:
            self._reasons.append(reason)

    def log(self, count: int | None = None, num_rows: int | None = None) -> None:
        """Warn of the rows since the last call: `count` out of `num_rows`, if these are known."""
        count = self._count if count is None else count
        if count:
            of = "rows" if num_rows is None else f"of {num_rows} rows"
            reasons = "".join(f"\n  {reason}" for reason in self._reasons)
            logger.warning("%s left out %d %s%s", self.call, count, of, reasons and f":{reasons}")
        self._count, self._reasons = 0, []


class RowFunction:
    """Calls a function with one row at a time; an error names the file and the row."""

    def __init__(
        self,
        function: Callable[..., Any],
        origins: Origins,
        on_error: str,
        left_out: LeftOut | None = None,
    ) -> None:
        self._function, self._origins, self._on_error = function, origins, on_error
        self._left_out = left_out

    def __call__(self, number: int, row: Any) -> Any:
        """Return the function's value for a row; None where a bad row is to be skipped.

        Raises DataError.
        """
        try:
            result = self._call(number, row)
        except DataError as error:
            if self._on_error == "raise":
                raise
            if self._left_out is not None:
                self._left_out.add(error.message)
            return None
        if result is None and self._left_out is not None:
            self._left_out.add(f"{self._origins.where(number)}: the step returned None")
        return result

    def _call(self, number: int, row: Any) -> Any:
        where = self._origins.where(number)
        if isinstance(row, Mapping) and is_empty(row):
            raise DataError(f"{where}: the row is empty", hint=f"remove it, {SKIP}")
        try:
            return self._function(row)
        except DataError as error:
            hint = error.hint or "correct or remove the row"
            raise DataError(f"{where}: {error.message}", hint=f"{hint}; {SKIP}") from error
        except MegatrainError:
            raise
        except KeyError as error:
            raise DataError(
                f"{where}: the row has no column {error}; it has {sorted(row)}",
                hint=f"use the preprocessor for these columns, or rename them, {SKIP}",
            ) from error
        except ROW_ERRORS as error:
            raise DataError(
                f"{where}: {type(error).__name__}: {error}; the row has {sorted(row)}",
                hint=f"correct or remove the row, {SKIP}",
            ) from error


class MapStep:
    """Replaces each row by what a preprocessor returns; None leaves the row out."""

    def __init__(self, function: RowFunction) -> None:
        self._function = function

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the new rows, as JSON, with their numbers."""
        texts, numbers = [], []
        for number, row in read_batch(batch):
            text = self._function(number, row)
            if text is not None:
                texts.append(text)
                numbers.append(number)
        return {JSON: texts, ROW: numbers}


class Preprocess:
    """A preprocessor whose result is checked and made JSON."""

    def __init__(self, preprocessor: Callable[[dict[str, Any]], Any]) -> None:
        self._preprocessor = preprocessor

    def __call__(self, row: dict[str, Any]) -> str | None:
        """Return the new row as JSON, None to leave it out."""
        return standard_json(self._preprocessor(row))


class PreprocessBatch:
    """A preprocessor that is called with a list of rows, and returns a row or None for each.

    Where it fails for a list, it is called with each row alone, so that the bad one is named, or
    left out.
    """

    def __init__(
        self,
        preprocessor: Callable[[list[dict[str, Any]]], Any],
        origins: Origins,
        on_error: str,
        left_out: LeftOut | None = None,
    ) -> None:
        self._preprocessor, self._origins, self._on_error = preprocessor, origins, on_error
        self._to_json = RowFunction(standard_json, origins, on_error, left_out)
        self._alone = RowFunction(self._one, origins, on_error, left_out)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the new rows, as JSON, with their numbers."""
        numbers, texts = batch[ROW], self._texts(batch)
        kept = [(text, number) for text, number in zip(texts, numbers, strict=True) if text]
        return {JSON: [text for text, _ in kept], ROW: [number for _, number in kept]}

    def _texts(self, batch: Mapping[str, Sequence[Any]]) -> list[str | None]:
        numbers, rows = zip(*read_batch(batch), strict=True)
        if any(is_empty(row) for row in rows):
            return self._singly(batch)
        where = f"{self._origins.where(numbers[0])} to {self._origins.where(numbers[-1])}"
        try:
            results = list(self._preprocessor(list(rows)))
        except (DataError, *ROW_ERRORS) as error:
            texts = self._singly(batch)
            if self._on_error == "skip":
                return texts
            raise DataError(
                f"{where}: {type(error).__name__}: {error}",
                hint="each of these rows alone is taken: mend the function for many",
            ) from error
        if len(results) != len(rows):
            raise DataError(
                f"{where}: a batched preprocessor must return a row or None for each of "
                f"{len(rows)} rows: got {len(results)}",
                hint="leave batched=True out for a function of one row",
            )
        return [self._to_json(*pair) for pair in zip(numbers, results, strict=True)]

    def _singly(self, batch: Mapping[str, Sequence[Any]]) -> list[str | None]:
        return [self._alone(number, row) for number, row in read_batch(batch)]

    def _one(self, row: dict[str, Any]) -> str | None:
        """Return a row's result as JSON."""
        results = list(self._preprocessor([row]))
        if len(results) != 1:
            raise DataError(f"a batched preprocessor must return one row for one: got {results!r}")
        return standard_json(results[0])


def standard_json(result: Any) -> str | None:
    """Return a preprocessor's result as JSON, None to leave the row out.  Raises DataError."""
    if result is None:
        return None
    if not isinstance(result, Mapping):
        raise DataError(
            f"a preprocessor must return a row (a mapping) or None: got {type(result).__name__}",
            hint="return {'messages': [...]}",
        )
    return to_json(result)


class FilterStep:
    """Says for each row whether a filter keeps it; a bad row that is skipped is not kept."""

    def __init__(self, function: RowFunction, read: Callable[..., Any] = read_batch) -> None:
        self._function, self._read = function, read

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> list[bool]:
        """Return a bool for each row."""
        return [bool(self._function(number, row)) for number, row in self._read(batch)]
