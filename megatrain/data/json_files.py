"""JSON and JSON-lines files, read so that an error names the line."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatrain.data.origin import ROW
from megatrain.data.rows import JSON, to_json
from megatrain.data.steps import SKIP, LeftOut
from megatrain.errors import DataError, MegatrainError

_SKIP = f"correct or remove the line, {SKIP}"


class ParseLines:
    """Checks lines of text and numbers them: a step for `datasets`' map, batched with indices."""

    def __init__(self, path: Path, start: int, on_error: str, left_out: LeftOut) -> None:
        self._path, self._start, self._on_error = path, start, on_error
        self._left_out = left_out

    def __call__(self, batch: dict[str, Sequence[str]], indices: Sequence[int]) -> dict[str, Any]:
        """Return the rows on these lines; blank lines are left out."""
        texts, numbers = [], []
        for index, line in zip(indices, batch["text"], strict=True):
            if not line.strip():
                continue
            try:
                self._check(line.removeprefix("\ufeff"), index + 1)
            except DataError as error:
                if self._on_error == "raise":
                    raise
                self._left_out.add(error.message)
                continue
            texts.append(line.removeprefix("\ufeff"))
            numbers.append(self._start + index + 1)
        return {JSON: texts, ROW: numbers}

    def _check(self, line: str, number: int) -> None:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self._path}, line {number} is not JSON: {error.msg} at column {error.colno}",
                hint=_SKIP,
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{self._path}, line {number} must be one JSON object: got {type(row).__name__}",
                hint=_SKIP,
            )
        if "\\ud" in line.lower():
            _check_text(row, f"{self._path}, line {number}")


def read_array(path: Path, start: int) -> Iterator[dict[str, Any]]:
    """Yield the stored rows of a .json file that is one array of objects."""
    for index, row in enumerate(_load_array(path)):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {index + 1} must be a JSON object: got {type(row).__name__}",
                hint="correct or remove the row",
            )
        yield {JSON: _check_text(row, f"{path}, row {index + 1}"), ROW: start + index + 1}


def is_array(path: Path) -> bool:
    """Return whether a .json file holds one array, rather than an object on each line."""
    with path.open("rb") as file:
        while chunk := file.read(4096):
            text = chunk.removeprefix(b"\xef\xbb\xbf").lstrip()
            if text:
                return text.startswith(b"[")
    raise DataError(f"{path} is empty", hint="give a file with rows")


def check_lines(path: Path) -> None:
    """Raise DataError for a .json file that is one object over several lines."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        json.loads(first)
    except ValueError:  # it may be one line that is wrong, which is named when it is read
        try:
            whole = json.loads(path.read_text("utf-8-sig"))
        except ValueError:
            return
        lists = [name for name, value in whole.items() if isinstance(value, list)]
        raise DataError(
            f"{path} is one JSON object over several lines, with {sorted(whole)}: not rows",
            hint="write an array of rows" + (f": the value of {lists[0]!r}" if lists else ""),
        ) from None


def find_bad_bytes(path: Path) -> DataError | None:
    """Return an error that names the first line that is not UTF-8, if there is one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return DataError(
                    f"{path}, line {number} is not UTF-8 text: {error.reason}",
                    hint="save the file as UTF-8",
                )
    return None


def find_own(error: BaseException | None) -> MegatrainError | None:
    """Return the error of ours among an error and its causes: `datasets` wraps what it meets."""
    while error is not None:
        if isinstance(error, MegatrainError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _check_text(row: dict[str, Any], where: str) -> str:
    """Return the row as JSON; an error names it."""
    try:
        return to_json(row)
    except DataError as error:
        raise DataError(f"{where}: {error.message}", hint=error.hint or _SKIP) from error


def _load_array(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno} is not JSON: {error.msg} at column {error.colno}",
            hint="a .json file is an array of objects, or has an object on each line",
        ) from error
    except UnicodeDecodeError as error:
        raise find_bad_bytes(path) or error from error
    if not isinstance(rows, list):
        raise DataError(f"{path} must be an array of objects", hint="write [{...}, {...}]")
    return rows
