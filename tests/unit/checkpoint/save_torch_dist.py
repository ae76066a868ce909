"""A process that writes a torch_dist checkpoint with Megatron's own code: `FOLDER`."""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import megatrain


def main(folder: Path) -> None:
    """Write a tensor in two chunks, one in bfloat16, and an object."""
    with tempfile.TemporaryDirectory() as name:
        store = dist.FileStore(str(Path(name) / "store"), 1)
        megatrain.initialize(mode="local", platform="cpu", store=store, rank=0, world_size=1)
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing import ShardedTensor
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        values = torch.arange(24.0).view(6, 4)
        state = {
            "first": ShardedTensor.from_rank_offsets("w", values[:3], (0, 0, 2)),
            "second": ShardedTensor.from_rank_offsets("w", values[3:], (0, 1, 2)),
            "half": ShardedTensor.from_rank_offsets("half", torch.ones(5, dtype=torch.bfloat16)),
            "extra": ShardedObject("extra", {"x": 1}, (1,), (0,)),
        }
        folder.mkdir(parents=True)
        dist_checkpointing.save(state, folder)
        megatrain.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
