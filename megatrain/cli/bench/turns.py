"""How the command and the two systems take turns: one does a unit of work while the other sleeps.

The command appends a line to `SYSTEM.asked.jsonl`; every rank of the system does what it says and
appends a line to `SYSTEM.done.RANK.jsonl`.  Files, because ranks under torchrun have no input.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatrain.cli.quickstart.child import ChildFailedError, first_failure

POLL_S = 0.02
STOP_TIMEOUT_S = 15.0
PAUSE_S = 0.3
"""Before each unit: idle OpenMP threads of the system that was last spin for up to 0.2 s."""

Answer = dict[str, Any]
Unit = dict[str, Any]
STOP: Unit = {"phase": "stop"}
COMMAND_PID = "MEGATRAIN_BENCH_PID"
"""Variable with the command's process: a system ends when that has gone."""


def serve(
    folder: Path, system: str, *, rank: int, ready: Answer, do: Callable[[Unit], Answer]
) -> None:
    """Do units as they are asked for, until STOP.  `ready` is the answer to having started."""
    done = folder / f"{system}.done.{rank}.jsonl"
    asked = folder / f"{system}.asked.jsonl"
    _append(done, ready)
    index = 0
    while True:
        units = _whole_lines(asked)
        if index == len(units):
            if not _command_lives():
                return
            time.sleep(POLL_S)
            continue
        if units[index] == STOP:
            return
        _append(done, do(units[index]))
        index += 1


class System:
    """The processes of one system, as the command sees them."""

    def __init__(
        self, name: str, command: list[str], *, folder: Path, num_ranks: int, threads: int
    ) -> None:
        self.name, self.folder, self.num_ranks = name, folder, num_ranks
        self._command, self._threads, self._answered = command, threads, 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, timeout_s: float) -> list[Answer]:
        """Start it and wait until it has loaded the model; return each rank's first answer."""
        settings = {
            "OMP_NUM_THREADS": str(self._threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONUNBUFFERED": "1",
            COMMAND_PID: str(os.getpid()),
        }
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | settings
            )
        return self._wait(timeout_s)

    @property
    def log(self) -> Path:
        """All that its processes print."""
        return self.folder / f"{self.name}.log"

    def ask(self, unit: Unit, *, timeout_s: float) -> list[Answer]:
        """Have one unit of work done; return each rank's answer.

        Raises ChildFailedError if a process has ended or the time is over.
        """
        time.sleep(PAUSE_S)
        _append(self.folder / f"{self.name}.asked.jsonl", unit)
        return self._wait(timeout_s)

    def _wait(self, timeout_s: float) -> list[Answer]:
        files = [self.folder / f"{self.name}.done.{rank}.jsonl" for rank in range(self.num_ranks)]
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self._process is None or self._process.poll() is not None
            answers = [_whole_lines(file) for file in files]
            if all(len(lines) > self._answered for lines in answers):
                self._answered += 1
                return [lines[self._answered - 1] for lines in answers]
            if ended:
                self._fail("ended before its work was done")
            if time.monotonic() > deadline:
                self._fail(f"did not answer within {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def _fail(self, what: str) -> None:
        raise first_failure(self.folder) or ChildFailedError(
            f"{self.name} {what}\n{self.log.read_text(errors='replace')[-3000:].rstrip()}"
        )

    def stop(self) -> None:
        """End it; harmless when it does not run."""
        process = self._process
        if process is None:
            return
        self._process = None
        _append(self.folder / f"{self.name}.asked.jsonl", STOP)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks when it is asked to
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
        if process.poll() is None:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self._process is not None:
            self._process.terminate()
        self.stop()


def _command_lives() -> bool:
    pid = os.environ.get(COMMAND_PID)
    if pid is None:
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def _append(file: Path, value: Answer) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(value) + "\n")


def _whole_lines(file: Path) -> list[Answer]:
    if not file.exists():
        return []
    text, _, _ = file.read_text().rpartition("\n")
    return [json.loads(line) for line in text.splitlines()]
