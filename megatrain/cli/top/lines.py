"""A frame of `megatrain top` as plain lines, for logs."""

from collections.abc import Iterable, Sequence
from typing import Any

from megatrain.cli.top import rows


def to_lines(status: dict[str, Any]) -> list[str]:
    """Return the lines of a status."""
    lines = [f"{name:9} {text}".rstrip() for name, text in rows.head(status)]
    lines += [f"loss      {text}" for text in rows.losses(status)]
    lines += _table(rows.RANK_COLUMNS, map(rows.rank_row, status["ranks"]))
    return lines + _table(rows.COMMAND_COLUMNS, map(rows.command_row, status["commands"]))


def _table(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """Return rows with columns as wide as they need to be."""
    found = [tuple(columns), *cells]
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    if len(found) == 1:
        return []
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in found
    ]
