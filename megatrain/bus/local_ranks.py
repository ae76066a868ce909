"""Ranks as processes of this host, started by their driver, and gone with it.  No torch."""

import collections
import contextlib
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from megatrain.bus.address import Address
from megatrain.bus.rank_options import RankOptions
from megatrain.bus.rank_process import RankProcess, how_it_ended, spawner
from megatrain.config.bus import BusConfig
from megatrain.parallel.environment import (
    import_variables,
    rank_environment,
    rank_variables,
)
from megatrain.parallel.layout import DeviceMesh

KEPT_LINES = 200
"""Lines of each rank's output that are kept for an error."""
STOPPED_S = 10.0
"""Seconds that ranks which were told to stop get to end."""
KILLED_S = 10.0
"""Seconds that the system gets to end a process that was killed."""


class LocalRanks:
    """`mesh.world_size` processes; what they print is passed on with their rank in front."""

    def __init__(
        self,
        mesh: DeviceMesh,
        config: BusConfig,
        *,
        seed: int = 42,
        platform: str = "auto",
        timeout_s: float = 1800.0,
    ) -> None:
        self.mesh = mesh
        self._options = RankOptions(
            listen="",
            mesh=mesh,
            seed=seed,
            platform=platform,
            timeout_s=timeout_s,
            bus=config,
            dies_with_input=True,
        )
        self._spawner = spawner(platform, fork=config.fork_ranks)
        self._folder = Path(tempfile.mkdtemp(prefix="megatrain-"))  # 0700: its socket is ours alone
        self._processes: list[RankProcess] = []
        self._output: list[collections.deque[str]] = []
        self._starts = 0

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]

    def start(self) -> Address:
        """Start all ranks, anew if they have run before; return where rank 0 will listen."""
        self.end(grace_s=0.0)
        self._starts += 1
        address = Address(path=str(self._folder / f"{self._starts}.socket"))
        options = replace(
            self._options,
            listen=str(address),
            rendezvous=str(self._folder / f"{self._starts}.port"),
        )
        world = self.mesh.world_size
        environment = rank_environment(world) | import_variables() | options.to_environment()
        self._output = [collections.deque(maxlen=KEPT_LINES) for _ in range(world)]
        for rank in range(world):
            process = self._spawner.spawn(environment | rank_variables(rank, world))
            self._processes.append(process)
            threading.Thread(target=self._pass_on, args=(rank, process), daemon=True).start()
        return address

    def _pass_on(self, rank: int, process: RankProcess) -> None:
        kept = self._output[rank]
        with contextlib.suppress(ValueError), process.output:  # closed at the driver's end
            for raw in process.output:
                line = raw.decode(errors="replace").rstrip()
                kept.append(line)
                sys.stderr.write(f"[rank {rank}] {line}\n")

    def failure(self) -> str | None:
        """Return which ranks have ended, those that a signal ended first; None if all run."""
        ended = [
            (rank, status)
            for rank, process in enumerate(self._processes)
            if (status := process.poll()) is not None
        ]
        if not ended:
            return None
        killed = [each for each in ended if each[1] < 0] or ended
        return "; ".join(
            f"rank {rank} (pid {self._processes[rank].pid}) {how_it_ended(status)}"
            for rank, status in killed
        )

    def output(self) -> str:
        """Return the last lines of the ranks that have ended, errors first."""
        parts = []
        for rank, process in enumerate(self._processes):
            if process.poll() not in (None, 0) and self._output[rank]:
                parts.append(f"rank {rank}:\n" + "\n".join(list(self._output[rank])[-30:]))
        return "\n".join(parts)

    def end(self, grace_s: float) -> None:
        """End all ranks; those that do not end by themselves within the grace are killed."""
        limit = time.monotonic() + grace_s
        for process in self._processes:
            if process.wait(max(0.0, limit - time.monotonic())) is None:
                process.kill()
        for process in self._processes:
            process.wait(KILLED_S)
            process.close()
        self._processes = []

    def close(self, *, orderly: bool = True) -> None:
        """End all ranks and remove what they left."""
        self.end(STOPPED_S if orderly else 0.0)
        shutil.rmtree(self._folder, ignore_errors=True)
