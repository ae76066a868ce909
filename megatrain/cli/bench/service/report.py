"""What a run found: two tables, notes, JSON and a picture."""

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatrain.cli.bench import report
from megatrain.cli.bench.service.crowd import Crowd
from megatrain.cli.bench.service.overhead import Overhead, quantiles
from megatrain.cli.bench.service.overhead import lines as overhead_lines

HEADS = ("one client", "median ms", "90 % ms")
CROWD_HEADS = ("many clients", "")
LAST = 99
"""Percentile of the longest waits that is told."""


def crowd_lines(found: Crowd) -> list[list[str]]:
    """Return the rows of the table of many clients."""
    tokens, waits = [share.tokens for share in found.shares], found.latencies
    rate = sum(tokens) / found.seconds
    rows = [
        ("clients, errors", f"{len(found.shares)}, {len(found.errors)}"),
        ("seconds", f"{found.seconds:g}"),
        ("tokens/s, forward_backward/s", f"{rate:,.0f}, {len(waits) / found.seconds:.1f}"),
        ("tokens of a client, least to most", f"{min(tokens):,} to {max(tokens):,}"),
        ("Jain's index of tokens", f"{found.jain:.4f}"),
    ]
    if waits:
        median, last = waits[len(waits) // 2], waits[min(len(waits) - 1, len(waits) * LAST // 100)]
        rows.append((f"wait for a result, median and {LAST} %", f"{median:.3f} s, {last:.3f} s"))
    for name in ("service", "ranks"):
        at = [getattr(m, name) for m in (found.memory[0], found.middle, found.memory[-1])]
        said = ", ".join(f"{each / 1e6:,.0f}" for each in at)
        rows.append((f"memory of {name}, begin, middle, end", f"{said} MB"))
    return [list(row) for row in rows]


def notes(load_before: float) -> list[str]:
    """Return what must be known to read the tables."""
    machine = report.machine()
    found = [
        f"{machine['cpu']}, {machine['cores']} cores, load {load_before:.1f} before the run",
        "overhead: round trip of Tinker's client without what rank 0 says of its own time",
    ]
    shared = report.shared_note(load_before, machine["cores"])
    return [*found, shared] if shared else found


def to_json(overhead: Overhead | None, crowd: Crowd | None, job: dict[str, Any]) -> dict[str, Any]:
    """Return everything, as plain values."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "job": job,
        "machine": report.machine(),
        "versions": report.versions(),
    }
    if overhead is not None:
        median, last = quantiles(overhead.overhead)
        found["overhead"] = asdict(overhead) | {"median_ms": median, "p90_ms": last}
    if crowd is not None:
        found["crowd"] = asdict(crowd) | {"jain": crowd.jain}
    return found


def show(overhead: Overhead | None, crowd: Crowd | None, load_before: float) -> None:
    """Print the tables."""
    said = notes(load_before)
    if overhead is not None:
        report.show_lines(HEADS, overhead_lines(overhead), [] if crowd is not None else said)
    if crowd is not None:
        report.show_lines(CROWD_HEADS, crowd_lines(crowd), said)


def draw(overhead: Overhead | None, crowd: Crowd | None, path: Path) -> None:
    """Draw where a call's time goes, what each client got, and memory over time."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    plots = list(
        figure.subplots(1, (overhead is not None) + 2 * (crowd is not None), squeeze=False)[0]
    )
    if overhead is not None:
        _draw_phases(plots.pop(0), overhead)
    if crowd is not None:
        _draw_shares(plots.pop(0), crowd)
        _draw_memory(plots.pop(0), crowd)
    figure.savefig(path)


def _draw_phases(plot: Any, found: Overhead) -> None:
    names = list(found.phases)
    plot.barh(names[::-1], [quantiles(found.phases[name])[0] for name in names[::-1]])
    plot.set(title="overhead of a call", xlabel="ms (median)")


def _draw_shares(plot: Any, found: Crowd) -> None:
    plot.bar([share.number for share in found.shares], [share.tokens for share in found.shares])
    plot.set(title=f"tokens trained, Jain {found.jain:.4f}", xlabel="client")


def _draw_memory(plot: Any, found: Crowd) -> None:
    seconds = [each.seconds for each in found.memory]
    for name in ("service", "ranks", "results"):
        plot.plot(seconds, [getattr(each, name) / 1e6 for each in found.memory], label=name)
    plot.set(title="memory", xlabel="s", ylabel="MB", ylim=(0, None))
    plot.legend()
