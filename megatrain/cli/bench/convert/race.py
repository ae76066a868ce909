"""The order of work: a copy, each system's import, then its export; at last bytes are compared."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from megatrain.cli.bench.convert.job import ConvertJob
from megatrain.cli.bench.turns import Answer, System
from megatrain.errors import MegatrainError

TIMEOUT_S = 7200.0
PHASES = ("import", "export")


class OtherBytesError(MegatrainError, ArithmeticError):
    """What came back is not what went in, so its time means nothing."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a run found out."""

    num_bytes: int
    """Of the checkpoint's files."""
    largest_file: int
    copies: list[float] = field(default_factory=list)
    """Seconds of each `cp -r`, until all is on the disk."""
    answers: dict[tuple[str, str], list[Answer]] = field(default_factory=dict)
    """By system and phase."""
    same_bytes: dict[str, bool] = field(default_factory=dict)


def run(job: ConvertJob, systems: Mapping[str, System], say: Callable[[str], None]) -> Outcome:
    """Measure everybody.  Raises ChildFailedError, or OtherBytesError of ours."""
    sizes = [path.stat().st_size for path in job.checkpoint.glob("*.safetensors")]
    outcome = Outcome(sum(sizes), max(sizes))
    with ExitStack() as stack:
        for name, system in systems.items():
            say(f"{name}: starting, and converting a tiny checkpoint")
            stack.enter_context(system).start(timeout_s=TIMEOUT_S)
        for _ in range(job.repeats):
            outcome.copies.append(_copy(job))
            say(f"cp -r: {outcome.copies[-1]:.1f} s")
            for phase in PHASES:
                for name, system in systems.items():
                    _measure(outcome, system, name, phase, say)
            for name in systems:
                _compare(job, outcome, name)
    return outcome


def _measure(
    outcome: Outcome, system: System, name: str, phase: str, say: Callable[[str], None]
) -> None:
    os.sync()  # what was written before must not be waited for now
    answer = system.ask({"phase": phase}, timeout_s=TIMEOUT_S)[0]
    outcome.answers.setdefault((name, phase), []).append(answer)
    say(f"{name}: {phase} {answer['seconds']:.1f} s, {answer['growth'] / 1e6:,.0f} MB")


def _copy(job: ConvertJob) -> float:
    target = job.folder / "copy"
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(job.checkpoint), str(target)], check=True)
    for path in target.iterdir():
        _wait_for_disk(path)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def _wait_for_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _compare(job: ConvertJob, outcome: Outcome, name: str) -> None:
    """Compare what came back with the checkpoint, and make room for the next round."""
    from megatrain.export.compare.files import compare_files
    from megatrain.export.compare.place import recognise
    from megatrain.export.compare.source import open_source

    back = job.folder / f"{name}-back"
    sides = [open_source(recognise(place)) for place in (job.checkpoint, back)]
    outcome.same_bytes[name] = compare_files(*sides, tolerance=None).same
    for place in (back, job.folder / f"{name}-middle"):
        shutil.rmtree(place)
    if name == "ours" and not outcome.same_bytes[name]:
        raise OtherBytesError(f"{job.checkpoint} did not come back byte for byte")
