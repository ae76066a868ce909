"""A frame of `megatrain top` as rich draws it on a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatrain.cli.top import rows

STYLES = {"running": "green", "starting": "yellow", "recovering": "red", "over": "red"}
"""By the driver's state."""
AROUND = 5
"""Lines that title, empty lines and the tables' heads take."""


def to_screen(status: dict[str, Any], url: str, *, height: int | None) -> RenderableType:
    """Return what is drawn; no higher than `height` lines, if it is given."""
    head, losses = rows.head(status), rows.losses(status)
    room = None if height is None else max(4, height - len(head) - len(losses) - AROUND)
    ranks = _chosen(status["ranks"], None if room is None else max(2, room // 2))
    rest = None if room is None else max(2, room - len(ranks))
    parts: list[RenderableType] = [Text.assemble(("megatrain top ", "bold"), (url, "dim"))]
    parts += [_line(name, text, status) for name, text in head]
    parts += [Text(f"  {text}", "red", no_wrap=True, overflow="ellipsis") for text in losses]
    parts += [Text(""), _ranks(ranks, len(status["ranks"]))]
    return Group(*parts, Text(""), _commands(status["commands"], rest))


def _line(name: str, text: str, status: dict[str, Any]) -> Text:
    style = STYLES.get(status["state"], "") if name == "driver" else ""
    if name == "losses" and status["losses"]["total"]:
        style = "red"
    return Text.assemble((f"{name:9} ", "dim"), (text, style), no_wrap=True, overflow="ellipsis")


def _chosen(ranks: list[dict[str, Any]], most: int | None) -> list[dict[str, Any]]:
    """Return the ranks that there is room for: those in trouble before the others."""
    if most is None or len(ranks) <= most:
        return ranks
    chosen = sorted(ranks, key=lambda rank: not rows.is_troubled(rank))[: most - 1]
    return sorted(chosen, key=lambda rank: int(rank["rank"]))


def _ranks(ranks: list[dict[str, Any]], total: int) -> Table:
    table = _table(rows.RANK_COLUMNS, left=("host", "phase", "command"))
    for rank in ranks:
        style = "red" if rows.is_troubled(rank) else "" if rank["command"] else "dim"
        table.add_row(*(Text(cell) for cell in rows.rank_row(rank)), style=style)
    if total > len(ranks):
        table.add_row(Text("…"), Text(f"{total - len(ranks)} more"), style="dim")
    return table


def _commands(commands: list[dict[str, Any]], most: int | None) -> Table:
    """Return the table of commands: those that happen most often, if there is not room for all."""
    table = _table(rows.COMMAND_COLUMNS, left=("command",))
    busiest = sorted(commands, key=lambda each: (-each["per_second"], -each["done"]))
    for command in busiest[:most]:
        style = "red" if command["failed"] else ""
        table.add_row(*(Text(cell) for cell in rows.command_row(command)), style=style)
    return table


def _table(columns: Sequence[str], left: Sequence[str]) -> Table:
    # No lines between columns, so that a terminal of 80 columns takes it.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        justify: Any = "left" if name in left else "right"
        table.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")
    return table
