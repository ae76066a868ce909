"""The processes that quickstart starts, one after another, and how a failed one is told.

A child's output goes to a log file, so that the terminal belongs to the command; its progress is
read from a file of JSON lines.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatrain import errors
from megatrain.errors import MegatrainError

LOOPBACK = {"lo", "lo0"}
"""Names of the loopback interface on Linux and macOS."""
POLL_S = 0.1
STOP_TIMEOUT_S = 15.0
"""Seconds that a child gets to end its own children before it is killed."""
STALL_TIMEOUT_S = 300.0
"""Seconds without progress after which a child counts as stuck."""
PLAIN_LINE_EVERY_S = 5.0
"""How often progress is told where there is no terminal."""


class ChildFailedError(MegatrainError, RuntimeError):
    """A process that a command started failed or did not move."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A file of JSON lines, one per step, and what to call it."""

    label: str
    file: Path
    total: int


def python_module(module: str, *arguments: str) -> list[str]:
    """Return the command line of one Python process."""
    return [sys.executable, "-m", module, *arguments]


def torchrun(module: str, *arguments: str, world_size: int) -> list[str]:
    """Return the command line of `world_size` ranks on this machine, over loopback only."""
    options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={world_size}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", module, *arguments]


def run_child(
    command: list[str],
    *,
    name: str,
    logs: Path,
    processes: int = 1,
    progress: Progress | None,
    stall_timeout_s: float | None = STALL_TIMEOUT_S,
) -> None:
    """Run a process to its end and show its progress.

    Without `progress` it stands still all the time: `stall_timeout_s`, None for no limit, is then
    the time that it has in all.

    Raises ChildFailedError, with the traceback of the rank that failed first, when it fails or
    stands still for longer.
    """
    log = logs / f"{name.replace(' ', '_')}.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment(processes)
        ) as process,
    ):
        try:
            stalled = _follow(process, progress, stall_timeout_s)
        finally:
            _stop(process)
    if stalled:
        raise ChildFailedError(
            f"{name} must make progress within {stall_timeout_s:g} s and did not",
            hint=f"its output is in {log}",
        )
    if process.returncode:
        raise first_failure(logs) or ChildFailedError(
            f"{name} ended with exit code {process.returncode}\n{_explanation(log)}",
            hint=f"its whole output is in {log}",
        )


@contextlib.contextmanager
def report_failure(logs: Path, *, name: str) -> Iterator[None]:
    """Leave what fails inside in a file of `logs`, for `first_failure`, and let it fail."""
    try:
        yield
    except Exception as error:  # the edge of a process: told with its name and traceback
        failure = {
            "name": name,
            "kind": type(error).__name__,
            "message": getattr(error, "message", str(error)),
            "hint": getattr(error, "hint", None),
            "traceback": traceback.format_exc(),
        }
        (logs / f"{name.replace(' ', '_')}.failure.json").write_text(json.dumps(failure, indent=2))
        raise


def first_failure(logs: Path) -> MegatrainError | None:
    """Return what failed first: the other processes failed because of it.

    A MegatrainError keeps its kind and message; anything else comes with its traceback.
    """
    files = sorted(logs.glob("*.failure.json"), key=lambda file: file.stat().st_mtime_ns)
    if not files:
        return None
    failure = json.loads(files[0].read_text())
    kind = getattr(errors, failure["kind"], None)
    if isinstance(kind, type) and issubclass(kind, MegatrainError):
        return kind(f"{failure['name']}: {failure['message']}", hint=failure["hint"])
    return ChildFailedError(
        f"{failure['name']} failed\n{failure['traceback'].rstrip()}",
        hint=f"the whole output is in {logs}",
    )


def _environment(processes: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads of small ops starve a shared machine
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if loopback := LOOPBACK & {name for _, name in socket.if_nameindex()}:
        settings["GLOO_SOCKET_IFNAME"] = min(loopback)
    return os.environ | settings


def _follow(
    process: subprocess.Popen[bytes], progress: Progress | None, stall_timeout_s: float | None
) -> bool:
    """Show progress until the process has ended; return whether it was stuck instead."""
    reader, moved_at = _Reader(progress), time.monotonic()
    with contextlib.closing(reader):
        while process.poll() is None:
            time.sleep(POLL_S)
            if reader.read():
                moved_at = time.monotonic()
            if stall_timeout_s is not None and time.monotonic() - moved_at > stall_timeout_s:
                return True
        reader.read()
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process; torchrun ends its ranks when it is asked to."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _explanation(log: Path, count: int = 30) -> str:
    """Return the log's first traceback, which explains the ones after it, or else its end."""
    lines = log.read_text(errors="replace").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most")]
    return "\n".join(lines[starts[0] :][:count] if starts else lines[-count:])


class _Reader:
    """Shows the lines of a progress file as they come: a bar on a terminal, else lines."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._offset, self._told_at = progress, 0, time.monotonic()
        self._bar: tqdm[None] | None = None
        if progress is not None and sys.stderr.isatty():
            self._bar = tqdm(total=progress.total, desc=progress.label, unit="step")

    def read(self) -> int:
        """Show what is new; return how many steps it was."""
        if self._progress is None or not self._progress.file.exists():
            return 0
        with self._progress.file.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        steps = [json.loads(line) for line in whole.splitlines()]
        if steps:
            self._show(steps[-1], count=len(steps))
        return len(steps)

    def _show(self, step: dict[str, float], *, count: int) -> None:
        assert self._progress is not None
        shown = f"loss {step['loss']:.3f}"
        if "tokens_per_second" in step:
            shown += f", {step['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(count)
            return
        now, last = time.monotonic(), step["step"] == self._progress.total
        if last or now - self._told_at >= PLAIN_LINE_EVERY_S:
            self._told_at = now
            line = f"{self._progress.label} {step['step']}/{self._progress.total}: {shown}"
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
