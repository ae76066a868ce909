"""What every conversion has: a plan that can be shown alone, a progress bar, a report."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROBE_BYTES = 1 << 26
"""Written and read back to learn a disk's speed, for the time in a plan."""


@dataclass(frozen=True)
class Plan:
    """What a conversion will read, write and need."""

    what: str
    """The sub-command: `import`, `adapter merge`."""
    source: str
    target: str
    read_bytes: int
    written_bytes: int
    memory_bytes: int
    """Of one process, beyond what the interpreter and its libraries take."""
    num_tensors: int
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else a user wants to know: layout, dtype, number of files."""


def add_options(
    parser: argparse.ArgumentParser, *, verify: str | None = None, restart: bool = True
) -> None:
    """Declare --dry-run, --report, --restart unless told not to, --verify if its help is given."""
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write plan, figures and result as JSON"
    )
    if restart:
        parser.add_argument(
            "--restart", action="store_true", help="throw away what an interrupted run left"
        )
    if verify is not None:
        parser.add_argument("--verify", action="store_true", help=verify)


def run_job(
    args: argparse.Namespace,
    plan: Plan,
    work: Callable[["Progress"], Mapping[str, Any]],
    *,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Show the plan, or do the work and report on it; return 0.

    `check` raises what the work would and writes nothing.  What it imports counts as libraries, not
    as memory of the work.  `work` returns what the report says of the result, as JSON.
    """
    if args.report is not None:  # a report that cannot be written is told before the work
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.open("a").close()
    start = time.perf_counter()
    check()
    if args.dry_run:
        expected = expected_seconds(plan)
        _write_report(args, {"plan": asdict(plan), "seconds_expected": expected})
        _show({**_rows(plan), "time": f"about {expected:.0f} s on this disk"})
        return 0
    from megatrain.export.conversion.memory import PeakMemory, give_back_freed_tensors

    give_back_freed_tensors()
    with Progress(plan.what, plan.read_bytes) as progress, PeakMemory() as memory:
        result = work(progress)
    seconds = time.perf_counter() - start
    # Processes of the work's own, if there were any, tell theirs.
    growth = max(memory.growth, result.get("peak_memory_growth", 0))
    figures = {
        "seconds": round(seconds, 3),
        "peak_memory_growth": growth,
        "megatrain": version("megatrain"),
    }
    _write_report(args, {"plan": asdict(plan), **figures, "result": dict(result)})
    shown = {
        key.replace("_", " "): value
        for key, value in result.items()
        if not isinstance(value, list | dict) and key not in figures
    }
    shown["memory"] = f"{_megabytes(growth)} more at most, in one process"
    _show({**_rows(plan), "time": f"{seconds:.1f} s", **shown})
    return 0


class Progress:
    """Bytes that were read so far: a bar on a terminal, a line every ten seconds in a log."""

    def __init__(self, what: str, total: int) -> None:
        self._bar: Any = None
        self._what, self._total, self._done, self._said = what, total, 0, time.monotonic()

    def __enter__(self) -> "Progress":
        """Show the bar if somebody is looking."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="B", unit_scale=True, desc=self._what)
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def __call__(self, num_bytes: int) -> None:
        """Tell that so many more bytes were read."""
        self._done += num_bytes
        if self._bar is not None:
            self._bar.update(num_bytes)
        elif time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            share = 100 * self._done / max(self._total, 1)
            sys.stderr.write(f"{self._what}: {share:.0f} % of {_megabytes(self._total)}\n")


def expected_seconds(plan: Plan) -> float:
    """Return the time that reading and writing would take at the speed of the target's disk."""
    folder = Path(plan.target).absolute()
    while not folder.is_dir():
        folder = folder.parent
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(PROBE_BYTES >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        while file.read(1 << 20):
            pass
        seconds = time.perf_counter() - start
    return round(seconds * max(plan.read_bytes, plan.written_bytes) / PROBE_BYTES, 1)


def _rows(plan: Plan) -> dict[str, Any]:
    return {
        plan.what: f"{plan.source} -> {plan.target}",
        "tensors": plan.num_tensors,
        "read": _megabytes(plan.read_bytes),
        "written": _megabytes(plan.written_bytes),
        "memory": f"about {_megabytes(plan.memory_bytes)} a process",
        **plan.details,
    }


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _show(rows: Mapping[str, Any]) -> None:
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _write_report(args: argparse.Namespace, report: Mapping[str, Any]) -> None:
    if args.report is not None:
        args.report.write_text(json.dumps(report, indent=1, default=str) + "\n")
