"""The process groups of the fsdp axis, in Megatron's order of ranks."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatrain.parallel.layout import DeviceMesh


@dataclass(frozen=True, slots=True)
class ShardGroups:
    """With whom a rank shares parameters that are sharded over the fsdp axis."""

    shards: dist.ProcessGroup
    """Ranks that together hold what other layouts hold on one, and see other data."""
    replicas: dist.ProcessGroup
    """Ranks that hold the same shard of the dense parameters and see other tokens."""
    expert_replicas: dist.ProcessGroup
    """Ranks that hold the same shard of the same experts and see other tokens."""


def make_shard_groups(mesh: DeviceMesh, timeout: timedelta) -> ShardGroups:
    """Make the groups of the fsdp axis.  Collective over the world."""
    inner, stage = mesh.tp * mesh.cp, mesh.tp * mesh.cp * mesh.dp

    def shard(rank: int) -> tuple[int, int]:
        """Return the pipeline stage, and the place among the ranks of the fsdp axis."""
        return rank // stage, rank // inner % mesh.fsdp

    def group(key: Callable[[int], Hashable]) -> dist.ProcessGroup:
        members: dict[Hashable, list[int]] = {}
        for rank in range(mesh.world_size):
            members.setdefault(key(rank), []).append(rank)
        mine, _ = dist.new_subgroups_by_enumeration(list(members.values()), timeout=timeout)
        assert mine is not None
        return mine

    return ShardGroups(
        shards=group(lambda rank: (rank // (inner * mesh.fsdp), rank % inner)),
        replicas=group(lambda rank: (shard(rank), rank % mesh.tp)),
        expert_replicas=group(lambda rank: (shard(rank), rank % (mesh.ep * mesh.etp))),
    )
