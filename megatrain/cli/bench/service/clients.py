"""Some of the many clients of a run, each with an adapter and a thread, in a process of their own.

Run as `python -m megatrain.cli.bench.service.clients JOB.json`.  It writes `up` when all have their
adapters, begins at a line on its standard input, and ends with a line of JSON for each client.
"""

import json
import random
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatrain.cli.bench.service.data import draw_datum, new_service_client

SIZES = (16, 96)
"""Tokens of the shortest and the longest datum."""
DATA = 2
"""Of a request."""


@dataclass(slots=True)
class Share:
    """What one client got."""

    number: int
    tokens: int = 0
    """Trained, of requests whose result came."""
    steps: int = 0
    latencies: list[float] = field(default_factory=list)
    """Seconds from a forward_backward to its result."""
    error: str = ""


class Client:
    """Trains until it is told to stop."""

    def __init__(self, job: dict[str, Any], number: int) -> None:
        self._job, self.share = job, Share(number)
        self._draw = random.Random(number)

    def open(self) -> None:
        """Make the adapter."""
        service = new_service_client(self._job["url"], self._job["key"])
        rank = self._job["ranks"][self.share.number % len(self._job["ranks"])]
        made = service.create_lora_training_client(base_model=self._job["model"], rank=rank)
        self._training = made.result()

    def run(self, until: float) -> None:
        """Train until time.monotonic says so; whatever goes wrong is the share's error."""
        try:
            while time.monotonic() < until:
                self._step()
        except Exception:  # noqa: BLE001 - it is what the run reports
            self.share.error = traceback.format_exc()

    def _step(self) -> None:
        from tinker import types

        sizes = [self._draw.randint(*SIZES) for _ in range(DATA)]
        data = [draw_datum(self._draw, size, self._job["vocabulary"]) for size in sizes]
        began = time.perf_counter()
        passed = self._training.forward_backward(data, "cross_entropy")
        stepped = self._training.optim_step(types.AdamParams(learning_rate=1e-4))
        passed.result()
        self.share.latencies.append(time.perf_counter() - began)
        self.share.tokens += sum(sizes)
        stepped.result()
        self.share.steps += 1


def main(path: str) -> None:
    """Run the clients of a job."""
    job = json.loads(Path(path).read_text())
    clients = [Client(job, number) for number in job["numbers"]]
    for each in clients:
        each.open()
    print("up", flush=True)
    sys.stdin.readline()
    until = time.monotonic() + job["seconds"]
    threads = [threading.Thread(target=each.run, args=(until,)) for each in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in clients:
        print(json.dumps(asdict(each.share)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
