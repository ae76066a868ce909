"""A pool of rank processes for tests: started once, groups made anew for each layout.

Importing Megatron takes seconds, so one server process imports it and forks the ranks; they live
as long as the pool.  A task is a top-level function `f(rank, *args)` named as `module:function`;
arguments and results are what multiprocessing can send between processes of one test run.
"""

import gc
import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatrain.parallel.layout import DeviceMesh


class RankFailure(AssertionError):
    """A task raised on a rank; the message holds every rank's traceback."""


class RankPool:
    """`size` processes, of which the first `mesh.world_size` take part in a task."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megatrain.testing.preload"])
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self,
        task: Callable[..., Any],
        mesh: DeviceMesh,
        *args: Any,
        seed: int = 42,
        timeout_s: float = 120.0,
    ) -> list[Any]:
        """Run `task(*args)` on every rank of `mesh`, initialized; return results by rank.

        Raises RankFailure if any rank raises or does not answer in time.
        """
        name = f"{task.__module__}:{task.__qualname__}"
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            pipes = self._pipes[: mesh.world_size]
            for rank, pipe in enumerate(pipes):
                pipe.send((name, rank, mesh, store, seed, args))
            answers = self._collect(pipes, timeout_s)
        failures = [text for ok, text in answers if not ok]
        if failures:
            raise RankFailure("\n".join(failures))
        return [value for _, value in answers]

    def _collect(self, pipes: list[Connection], timeout_s: float) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < len(pipes):
            waiting = [p for i, p in enumerate(pipes) if i not in answers]
            ready = wait(waiting, timeout=timeout_s)
            if not ready:
                self.close()
                heard = [text for ok, text in answers.values() if not ok]
                missing = f"no answer within {timeout_s} s from {len(waiting)} rank(s)"
                raise RankFailure("\n".join([missing, *heard]))
            for index, pipe in enumerate(pipes):
                if pipe in ready:
                    try:
                        answers[index] = pipe.recv()
                    except EOFError:
                        answers[index] = (False, f"rank {index} died")
            if any(not ok for ok, _ in answers.values()):
                timeout_s = min(timeout_s, 10.0)
        return [answers[i] for i in range(len(pipes))]

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()


def _serve(pipe: Connection) -> None:
    """Answer tasks until the pool closes."""
    import torch  # noqa: PLC0415 - preloaded in the fork server

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported before the fork need not be looked at after every task
    while True:
        try:
            name, rank, mesh, store, seed, args = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(name, rank, mesh, store, seed, args))


def _answer(
    name: str, rank: int, mesh: DeviceMesh, store: str, seed: int, args: Any
) -> tuple[bool, Any]:
    import torch.distributed as dist  # noqa: PLC0415 - preloaded in the fork server

    import megatrain  # noqa: PLC0415

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(mesh.world_size))
    module, _, function = name.partition(":")
    try:
        megatrain.initialize(
            mode="local",
            global_device_mesh=mesh,
            seed=seed,
            platform="cpu",
            store=dist.FileStore(store, mesh.world_size),
            rank=rank,
            world_size=mesh.world_size,
            timeout_s=60.0,
        )
        return True, getattr(importlib.import_module(module), function)(*args)
    except BaseException:  # noqa: BLE001 - reported to the test that asked
        return False, f"rank {rank}:\n{traceback.format_exc()}"
    finally:
        megatrain.shutdown()
