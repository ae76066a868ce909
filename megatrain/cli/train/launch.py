"""The ranks that `megatrain train --nproc N` starts on this machine, with torchrun's environment.

The first rank has the terminal; the others write to files.  A signal is handed on to all ranks,
which save and end by themselves; if one fails, the others are ended.
"""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatrain.cli.quickstart.child import ChildFailedError, first_failure
from megatrain.cli.train.stop import StopRequest
from megatrain.parallel.environment import rank_environment, rank_variables

MODULE = "megatrain.cli.train.job"
POLL_S = 0.1
FAILURE_GRACE_S = 5.0
"""Seconds that ranks get to end on their own after one has failed."""


def run_ranks(config: Path, *, num_ranks: int, logs: Path) -> int:
    """Run the job on `num_ranks` processes; return their exit status.

    Raises what failed first on any rank.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.iterdir():
        old.unlink()
    command = [sys.executable, "-m", MODULE, str(config)]
    port, processes = _free_port(), []
    with StopRequest() as stop:
        try:
            for rank in range(num_ranks):
                processes.append(_start(command, rank, num_ranks, port, logs))
            _wait(processes, stop)
        finally:
            _end(processes)
    codes = [128 - code if code < 0 else code for code in (p.returncode for p in processes)]
    if failure := first_failure(logs):
        raise failure
    stopped = {128 + signal.SIGTERM, 128 + signal.SIGINT}
    if failed := [rank for rank, code in enumerate(codes) if code and code not in stopped]:
        raise ChildFailedError(
            f"rank {failed[0]} ended with exit code {codes[failed[0]]}",
            hint=f"the output of ranks 1 and up is in {logs}",
        )
    return int(codes[0])


def _start(
    command: list[str], rank: int, num_ranks: int, port: int, logs: Path
) -> "subprocess.Popen[bytes]":
    environment = rank_environment(num_ranks) | rank_variables(rank, num_ranks)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank == 0:
        return subprocess.Popen(command, env=environment)
    with (logs / f"rank_{rank}.log").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(processes: Sequence["subprocess.Popen[bytes]"], stop: StopRequest) -> None:
    """Wait until all ranks have ended, or one has failed; hand on a signal once."""
    told = False
    failed_at = None
    while any(process.poll() is None for process in processes):
        time.sleep(POLL_S)
        if stop.signal and not told:
            told = True
            for process in processes:
                if process.poll() is None:
                    process.send_signal(stop.signal)
        bad = [p for p in processes if p.poll() not in (None, 0, 128 + stop.signal)]
        if bad and failed_at is None:
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > FAILURE_GRACE_S:
            return


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End what still runs: it waits for a rank that is gone, and would not hear a signal."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
