"""The table and the histogram of `megatrain data stats`."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megatrain.data.statistics import DatasetStatistics

NUM_BINS = 60


def table_rows(
    statistics: DatasetStatistics,
    packed: DatasetStatistics | None,
    max_length: int | None,
    num_too_long: int,
) -> list[tuple[str, int | float]]:
    """Return names and numbers in the order in which they are printed."""
    rows: list[tuple[str, int | float]] = [
        ("rows", statistics.num_rows),
        ("tokens", statistics.num_tokens),
        ("labels", statistics.num_labels),
        ("mean length", round(statistics.mean_length, 1)),
    ]
    for percent, length in statistics.percentiles.items():
        name = {0: "shortest", 50: "median", 100: "longest"}.get(percent, f"{percent} % up to")
        rows.append((name, round(length, 1)))
    if max_length is not None:
        rows += [("max length", max_length), ("rows over max length", num_too_long)]
    if packed is not None and packed.fill_rate is not None:
        rows += [("packed rows", packed.num_rows), ("fill rate", round(packed.fill_rate, 4))]
    return rows


def show(rows: list[tuple[str, Any]], *, title: str) -> None:
    """Print the table."""
    table = Table("", "tokens or rows", title=title)
    table.columns[1].justify = "right"
    for name, value in rows:
        table.add_row(name, f"{value:,}")
    Console().print(table)


def plot(lengths: npt.NDArray[np.int64], path: Path, *, max_length: int | None) -> None:
    """Write a histogram of the rows' lengths as PNG."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.hist(lengths, bins=min(NUM_BINS, int(lengths.max()) + 1), color="#4477aa")
        if max_length is not None:
            axes.axvline(max_length, color="#cc3311", label=f"max length {max_length}")
            axes.legend()
        axes.set_xlabel("tokens of a row")
        axes.set_ylabel("rows")
        figure.savefig(path, dpi=120)
