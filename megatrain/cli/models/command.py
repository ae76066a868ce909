"""`megatrain models`: what holds of each architecture, from the record that the tests wrote."""

import argparse
import json
import sys
from typing import Any

STYLES = {"ok": "green", "no": "red", "not": "yellow"}
"""By a cell's first word; what is not listed is dim."""
WIDE = 110
"""Columns of a terminal from which on a cell stands in one line."""


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "models", help="which architectures hold, and what of each", description=__doc__
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="part of an architecture, family or model_type"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the record's rows as JSON")
    form.add_argument("--markdown", action="store_true", help="print the table of README.md")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the matrix; return 0.  Raises ConfigError if no architecture has the name."""
    from megatrain.cli.models import matrix as matrices

    rows = matrices.read_record()
    if args.name is not None:
        rows = matrices.select(rows, args.name)
    if args.json:
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return 0
    matrix = matrices.make_matrix(rows)
    if args.markdown:
        sys.stdout.write(matrices.to_markdown(matrix))
    else:
        _print_matrix(matrix)
    return 0


def _print_matrix(matrix: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    # No lines between columns, so that a terminal of 80 columns takes it.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, title in enumerate(matrix.header):
        table.add_column(title, overflow="fold", no_wrap=number >= 2)
    for family, architecture, *cells in matrix.rows:
        states = [Text(cell, style=STYLES.get(cell.partition(" ")[0], "dim")) for cell in cells]
        if console.width < WIDE:
            states = [Text("\n", style=state.style).join(state.split(" ")) for state in states]
        table.add_row(Text(family), Text(architecture), *states)
    console.print(table)
    for number, note in enumerate(matrix.notes, 1):
        console.print(f"({number}) {note}", highlight=False, markup=False, soft_wrap=True)
