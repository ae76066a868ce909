"""The matrix of architectures, from the record that the tests wrote.  Pure values: no torch."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatrain.errors import ConfigError

RECORD = Path(__file__).parents[2] / "config" / "support.json"
COLUMNS = {
    "load": "load",
    "tp": "TP",
    "pp": "PP",
    "cp": "CP",
    "ep": "EP",
    "lora": "LoRA",
    "export": "export",
    "import": "import",
    "vllm": "vLLM",
}
"""Title by the record's name."""
IDENTITY = ("architecture", "family", "model_type")
UNTESTED = "not tested"
SHORT = {"no experts": "-", "refused": "no"}
"""How the states that are not `ok` are shown; a reason follows a state after a colon."""

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A table of short cells; the reasons behind them stand in numbered notes."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    """The first is number 1."""


def read_record(path: Path = RECORD) -> list[dict[str, str]]:
    """Return a row for each architecture; a column that no test has written is not tested."""
    rows: list[dict[str, str]] = json.loads(path.read_text())
    return [dict.fromkeys(COLUMNS, UNTESTED) | row for row in rows]


def select(rows: Sequence[dict[str, str]], name: str) -> list[dict[str, str]]:
    """Return the rows with `name` in their architecture, family or model_type, in any case.

    Raises ConfigError if there is none.
    """
    wanted = name.lower()
    found = [row for row in rows if any(wanted in row[key].lower() for key in IDENTITY)]
    if not found:
        known = ", ".join(sorted({row["model_type"] for row in rows}))
        raise ConfigError(
            f"no architecture, family or model_type that was tested has {name!r} in it; "
            f"model_type is one of: {known}",
            hint="others may load, if Megatron-Bridge's AutoBridge registers them",
        )
    return found


def make_matrix(rows: Iterable[Row]) -> Matrix:
    """Shorten every cell, and number the reasons in the order in which they are met."""
    notes: dict[str, int] = {}
    lines = []
    for row in rows:
        name = _numbered(row["architecture"], row.get("note", ""), notes)
        cells = [_cell(row[column], notes) for column in COLUMNS]
        lines.append((row["family"], name, *cells))
    header = ("family", "architecture", *COLUMNS.values())
    return Matrix(header, tuple(lines), tuple(notes))


def to_markdown(matrix: Matrix) -> str:
    """Return the table and its notes as README.md has them."""
    lines = [
        _markdown_line(matrix.header),
        _markdown_line(["---"] * len(matrix.header)),
        *map(_markdown_line, matrix.rows),
        "",
        *(f"{number}. {note}" for number, note in enumerate(matrix.notes, 1)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: str, notes: dict[str, int]) -> str:
    state, _, reason = value.partition(": ")
    return _numbered(SHORT.get(state, state), reason, notes)


def _numbered(text: str, note: str, notes: dict[str, int]) -> str:
    return f"{text} ({notes.setdefault(note, len(notes) + 1)})" if note else text
