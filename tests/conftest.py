"""What tests share: one pool of ranks, and tiny checkpoints.

This process computes what Transformers and PEFT say; Megatron is imported and patched in the ranks
only.  With `--mode driver` or `--mode ray`, tasks run in this process, and drive ranks.
"""

import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatrain.parallel.layout import DeviceMesh
from megatrain.testing.ranks import RankFailure, RankPool
from megatrain.testing.tiny import make_checkpoint

POOL_SIZE = 8


class Ranks:
    """A pool of rank processes, started when it is first used and again after a rank is lost."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pool: RankPool | None = None

    def run(
        self, task: Callable[..., Any], mesh: DeviceMesh | None = None, *args: Any, **options: Any
    ) -> list[Any]:
        """Run `task(*args)` on every rank of `mesh` (one rank if None); return results by rank."""
        if self._pool is None:
            self._pool = RankPool(self._size)
        try:
            return self._pool.run(task, mesh or DeviceMesh(), *args, **options)
        except RankFailure:
            # Ranks may be out of step now: some raised while others wait in a collective.
            self.close()
            raise

    def close(self) -> None:
        """End all processes."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None


class DrivenRanks:
    """Runs a task as the one script of a driver; every rank has the same results."""

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def run(
        self,
        task: Callable[..., Any],
        mesh: DeviceMesh | None = None,
        *args: Any,
        seed: int = 42,
        timeout_s: float = 120.0,
    ) -> list[Any]:
        """Run `task(*args)` with ranks of `mesh` (one rank if None); return its result for each."""
        import megatrain

        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the pool
        mesh = mesh or DeviceMesh()
        options: dict[str, Any] = {"fork_ranks": True, "connect_timeout_s": timeout_s}
        if self._mode == "ray":
            from megatrain.bus.ray.cluster import import_ray

            ray = import_ray()
            if not ray.is_initialized():  # once for all tasks
                ray.init(address="local", num_cpus=POOL_SIZE, include_dashboard=False)
            group = megatrain.DeviceGroup(name="model", ranks=mesh.world_size, device_type="cpu")
            options = {"groups": [group], "connect_timeout_s": timeout_s}
        megatrain.initialize(
            mode=self._mode, global_device_mesh=mesh, seed=seed, platform="cpu", **options
        )
        try:
            return [task(*args)] * mesh.world_size
        except Exception as error:
            # As from ranks: a failure that holds the traceback.
            raise RankFailure(traceback.format_exc()) from error
        finally:
            megatrain.shutdown()

    def close(self) -> None:
        """Do nothing: each task ends its ranks."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mode", choices=["local", "driver", "ray"], default="local", help="how tasks reach ranks"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In another mode than local, leave out what looks at ranks from inside."""
    if config.getoption("--mode") != "local":
        left_out = [item for item in items if item.get_closest_marker("local_only")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks | DrivenRanks]:
    """Eight rank processes for the whole test run, or a driver's for each task."""
    mode = request.config.getoption("--mode")
    pool = Ranks(POOL_SIZE) if mode == "local" else DrivenRanks(mode)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a tiny checkpoint: `checkpoints(family, **changes)`, made once each."""
    made: dict[str, Path] = {}

    def checkpoint(family: str, **changes: Any) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = make_checkpoint(folder, family, **changes)
        return made[key]

    return checkpoint
