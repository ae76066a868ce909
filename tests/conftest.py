"""What tests share: one pool of ranks, and tiny checkpoints.

This process computes what Transformers and PEFT say; Megatron is imported and patched in the ranks
only.
"""

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


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Eight rank processes for the whole test run."""
    pool = Ranks(POOL_SIZE)
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
