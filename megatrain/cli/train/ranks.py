"""What the ranks of a run agree on beside batches: barriers, signals, what is on disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatrain.api.session import current_session


def started_ranks() -> int:
    """Return how many ranks were started, by torchrun's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started_rank() -> int:
    """Return which of them this process is."""
    return int(os.environ.get("RANK", "0"))


class Ranks:
    """This process among the ranks that `megatrain.initialize` joined.  Speaks over Gloo."""

    def __init__(self) -> None:
        groups = current_session().groups
        self._control, self.mesh = groups.control, groups.mesh
        self.rank, self.size = groups.rank, groups.mesh.world_size
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def is_first(self) -> bool:
        """Tell whether this is the rank that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all ranks.  Collective."""
        self.largest(0)

    def largest(self, value: int) -> int:
        """Return the largest value of any rank.  Collective."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._control)
        return int(tensor)

    def from_first(self, text: str) -> str:
        """Return the first rank's text.  Collective."""
        content = text.encode()
        size = self.largest(len(content) if self.is_first else 0)
        tensor = torch.zeros(size, dtype=torch.uint8)
        if self.is_first and size:
            tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if self.size > 1 and size:
            dist.broadcast(tensor, src=0, group=self._control)
        return bytes(tensor.tolist()).decode()

    @contextmanager
    def first_of_node_first(self) -> Iterator[None]:
        """Let one rank of each node do the work, then the others, who find it done.  Collective."""
        if self.local_rank != 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()
