"""A process that converts checkpoints when it is asked to: by this project, or by Bridge.

python -m megatrain.cli.bench.convert.system JOB.json ours|peer
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megatrain.cli.bench.convert.job import ConvertJob
from megatrain.cli.bench.convert.make import WARM_UP
from megatrain.cli.bench.memory import PeakMemory, Stopwatch, measurement, resident_memory, settle
from megatrain.cli.bench.turns import Answer, Unit, serve
from megatrain.cli.quickstart.child import report_failure
from megatrain.errors import MegatrainError


class Ours:
    """The command that a user calls, in this process."""

    def __init__(self, job: ConvertJob) -> None:
        self.job, self.report = job, job.folder / "report.json"

    def convert(self, phase: str, source: Path, middle: Path, back: Path) -> int:
        """Convert; return the most memory that a process of its own needed more, 0 if none ran."""
        from megatrain.cli import main

        places = {"import": (source, middle), "export": (middle, back)}[phase]
        options = ["--workers", str(self.job.workers), "--report", str(self.report)]
        if main(["convert", phase, *map(str, places), *options]):
            raise MegatrainError(f"convert {phase} failed; its words are in {self.job.folder}")
        result = json.loads(self.report.read_text())["result"]
        return int(result.get("peak_memory_growth", 0))


class Peer:
    """Megatron-Bridge's loader and writer, and Megatron's own save and load."""

    def __init__(self, job: ConvertJob) -> None:
        import megatrain

        megatrain.initialize(mode="local", platform="cpu")
        from megatrain.api.session import current_session

        self.groups = current_session().groups

    def convert(self, phase: str, source: Path, middle: Path, back: Path) -> int:
        """Convert; all of it is in this process."""
        from megatrain.export.conversion import by_bridge

        if phase == "import":
            by_bridge.to_megatron(source, middle, self.groups)
        else:
            by_bridge.to_hugging_face(source, middle, back, self.groups)
        return 0


SYSTEMS: dict[str, Callable[[ConvertJob], Ours | Peer]] = {"ours": Ours, "peer": Peer}


def measured(system: Ours | Peer, phase: str, source: Path, middle: Path, back: Path) -> Answer:
    """Convert, and return seconds and the growth of memory."""
    settle()
    before, device = resident_memory()[0], torch.device("cpu")
    with PeakMemory(device) as peak, Stopwatch(device) as watch:
        elsewhere = system.convert(phase, source, middle, back)
    return measurement(watch, peak) | {"growth": max(peak.bytes - before, elsewhere)}


def main() -> None:
    """Warm up, then serve."""
    job, name = ConvertJob.read(sys.argv[1]), sys.argv[2]
    with report_failure(job.folder, name=name):
        system = SYSTEMS[name](job)
        middle, back = (job.folder / f"{name}-{place}" for place in ("middle", "back"))
        for phase in ("import", "export"):
            system.convert(phase, job.folder / WARM_UP, middle, back)
        for place in (middle, back):
            shutil.rmtree(place)

        def do(unit: Unit) -> Answer:
            return measured(system, unit["phase"], job.checkpoint, middle, back)

        serve(job.folder, name, rank=0, ready={"threads": torch.get_num_threads()}, do=do)


if __name__ == "__main__":
    main()
