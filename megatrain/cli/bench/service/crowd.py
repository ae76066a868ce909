"""Many clients at once: what each got, how long it waited, and what the service's memory did."""

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from megatrain.cli.bench.service.clients import Share
from megatrain.cli.bench.service.scrape import scrape

LOOKS = 20
"""At memory, over a run."""
OVERTIME_S = 120.0
"""Seconds that clients get to finish what they have begun."""
LORA_RANKS = (4, 8, 16)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at a moment."""

    seconds: float
    """Since the clients began."""
    service: float
    ranks: float
    results: float
    """Of the service's, results that are kept for clients that ask again."""


@dataclass(slots=True)
class Crowd:
    """What a run found."""

    seconds: float
    shares: list[Share]
    memory: list[Memory] = field(default_factory=list)

    @property
    def jain(self) -> float:
        """Jain's index of fairness of the tokens that were trained: 1 where all got the same."""
        tokens = [share.tokens for share in self.shares]
        squares = len(tokens) * sum(each**2 for each in tokens)
        return sum(tokens) ** 2 / squares if squares else 0.0

    @property
    def latencies(self) -> list[float]:
        """Seconds of all forward_backwards, ordered."""
        return sorted(each for share in self.shares for each in share.latencies)

    @property
    def errors(self) -> list[str]:
        """What went wrong."""
        return [share.error for share in self.shares if share.error]

    def growth(self, name: str) -> float:
        """Return how many bytes the second half of the run has added."""
        return float(getattr(self.memory[-1], name) - getattr(self.middle, name))

    @property
    def middle(self) -> Memory:
        """The look in the middle of the run."""
        return self.memory[len(self.memory) // 2]


@dataclass(frozen=True, slots=True)
class Target:
    """A service that runs, and a model of it."""

    url: str
    key: str
    model: str
    vocabulary: int


def run(target: Target, folder: Path, *, clients: int, processes: int, seconds: float) -> Crowd:
    """Have many clients train for so long.  `folder` is for the processes' files.

    Raises RuntimeError for clients that cannot begin; what goes wrong later is their error.
    """
    with ExitStack() as stack:
        headers = {"X-API-Key": target.key}
        http = stack.enter_context(httpx.Client(base_url=target.url, headers=headers))
        started = []
        for index in range(processes):
            job = {
                **asdict(target),
                "numbers": list(range(index, clients, processes)),
                "seconds": seconds,
                "ranks": LORA_RANKS,
            }
            file = folder / f"clients-{index}.json"
            file.write_text(json.dumps(job))
            started.append(stack.enter_context(_Process(file)))
        for each in started:
            each.wait_until_up()
        for each in started:
            each.begin()
        memory = _watch(http, seconds)
        shares = [share for each in started for share in each.shares()]
    return Crowd(seconds, sorted(shares, key=lambda share: share.number), memory)


def _watch(http: httpx.Client, seconds: float) -> list[Memory]:
    began, found = time.monotonic(), []
    for look in range(LOOKS + 1):
        time.sleep(max(0.0, began + look * seconds / LOOKS - time.monotonic()))
        seen = scrape(http)
        found.append(
            Memory(
                time.monotonic() - began,
                seen.total("process_resident_bytes"),
                seen.total("rank_resident_bytes"),
                seen.total("results_bytes"),
            )
        )
    return found


class _Process:
    """A process of clients; leaving it ends it."""

    def __init__(self, job: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-m"]
        command += ["megatrain.cli.bench.service.clients", str(job)]
        self._seconds = float(json.loads(job.read_text())["seconds"])
        self._log = job.with_suffix(".log")
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *error: object) -> None:
        self._child.kill()
        self._child.wait()

    def wait_until_up(self) -> None:
        """Wait until all its clients have adapters.  Raises RuntimeError."""
        assert self._child.stdout is not None
        if self._child.stdout.readline() != "up\n":
            raise RuntimeError(f"clients could not begin:\n{self._log.read_text()[-4000:]}")

    def begin(self) -> None:
        """Let them begin."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()

    def shares(self) -> list[Share]:
        """Wait for the end; return what each client got.  Raises subprocess.TimeoutExpired."""
        said, _ = self._child.communicate(timeout=OVERTIME_S)
        if self._child.returncode:
            said = self._log.read_text()[-4000:]
            raise RuntimeError(f"clients ended with {self._child.returncode}:\n{said}")
        found: list[dict[str, Any]] = [json.loads(line) for line in said.splitlines()]
        return [Share(**each) for each in found]
