"""The process groups of a rank.  The only file that reads Megatron's global parallel_state."""

import contextlib
import copy
import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatrain.config.estimate.fits import Sizes, check_fits
from megatrain.errors import StateError
from megatrain.parallel.interface import VARIABLE, gloo_interface, is_one_host
from megatrain.parallel.layout import DeviceMesh
from megatrain.parallel.shard_groups import ShardGroups, make_shard_groups
from megatrain.platforms.platform import Platform

logger = logging.getLogger(__name__)

_generation = itertools.count()
"""How often this process has joined ranks of torchrun; the same on every one of them."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Where this rank is, and with whom it talks."""

    mesh: DeviceMesh
    rank: int
    device: torch.device
    control: dist.ProcessGroup
    """All ranks, over Gloo, for tensors on the CPU."""
    collection: Any
    """Megatron's ProcessGroupCollection of the same ranks."""
    fsdp: ShardGroups | None = None
    """None unless the mesh shards parameters."""

    @property
    def tp(self) -> dist.ProcessGroup:
        """Tensor parallel ranks."""
        return self.collection.tp

    @property
    def expert_tp(self) -> dist.ProcessGroup:
        """Tensor parallel ranks inside an expert."""
        return self.collection.expt_tp

    @property
    def data(self) -> dist.ProcessGroup:
        """Ranks that hold the same dense parameters and see other tokens: DP and CP together."""
        return self.collection.dp_cp

    @property
    def expert_data(self) -> dist.ProcessGroup:
        """Ranks that hold the same experts and see other tokens."""
        return self.collection.expt_dp

    @property
    def embedding(self) -> dist.ProcessGroup:
        """The first and the last pipeline stage, which both hold a tied embedding."""
        return self.collection.embd

    def of_shards(self) -> "Groups":
        """Return the same where `data` and `expert_data` are the replicas of a fsdp shard."""
        assert self.fsdp is not None
        collection = copy.copy(self.collection)
        collection.dp_cp = self.fsdp.replicas
        collection.expt_dp = self.fsdp.expert_replicas
        return replace(self, collection=collection)

    @property
    def is_last_stage(self) -> bool:
        """Tell whether this rank holds the last pipeline stage."""
        return bool(self.collection.pp.rank() == self.mesh.pp - 1)


def init_groups(
    mesh: DeviceMesh,
    platform: Platform,
    *,
    seed: int = 42,
    timeout_s: float = 1800.0,
    store: dist.Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> Groups:
    """Join the other ranks and make every group of the mesh.  Collective over the world.

    Rank and world size come from torchrun's environment unless given with a `store`; without
    either, this process is alone.  Raises LayoutError when the mesh does not cover the world.
    """
    from megatron.core import tensor_parallel  # noqa: PLC0415 - patched first

    if dist.is_initialized():
        raise StateError("the process groups are already there; call megatrain.shutdown() first")
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    mesh.check_world(world_size)
    device = platform.device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=timeout_s)
    _join(platform.collective_backend, rank, world_size, store, timeout)
    collection = _initialize_megatron(mesh, timeout_s)
    # Only dropout in front of LoRA draws from these, so that no two ranks need the same numbers.
    offset = 10_000 * collection.dp_cp.rank() + 1_000_000 * collection.pp.rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed + offset)
    control: Any = dist.group.WORLD
    if platform.collective_backend != "gloo":
        control = dist.new_group(backend="gloo", timeout=timeout)
    return Groups(
        mesh=mesh,
        rank=rank,
        device=device,
        control=control,
        collection=collection,
        fsdp=make_shard_groups(mesh, timeout) if mesh.fsdp > 1 else None,
    )


@contextlib.contextmanager
def playing(mesh: DeviceMesh, rank: int) -> Iterator[Groups]:
    """Be one rank of a mesh without the others, on the meta device: to describe, never to compute.

    Groups have their sizes and ranks; a collective over them does nothing.  Raises StateError if
    this process has joined real ranks.
    """
    from megatron.core import tensor_parallel  # noqa: PLC0415 - patched first
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415 - registers

    if dist.is_initialized():
        raise StateError("the process groups are already there; call megatrain.shutdown() first")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.world_size)
    try:
        collection = _initialize_megatron(mesh, timeout_s=60.0)
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        world: Any = dist.group.WORLD
        yield Groups(mesh, rank, torch.device("meta"), world, collection)
    finally:
        destroy_groups()


def _initialize_megatron(mesh: DeviceMesh, timeout_s: float) -> Any:
    """Make every group of the mesh; return Megatron's collection of them."""
    from megatron.core import parallel_state  # noqa: PLC0415 - patched first
    from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: PLC0415

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        virtual_pipeline_model_parallel_size=mesh.vpp if mesh.vpp > 1 else None,
        context_parallel_size=mesh.cp,
        expert_model_parallel_size=mesh.ep,
        expert_tensor_parallel_size=mesh.etp,
        distributed_timeout_minutes=max(1, int(timeout_s // 60)),
        create_gloo_process_groups=False,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def _join(
    backend: str, rank: int, world_size: int, store: dist.Store | None, timeout: timedelta
) -> None:
    if store is None and world_size == 1 and "MASTER_ADDR" not in os.environ:
        store = dist.HashStore()
    choose_interface(world_size)
    if store is None:
        # torchrun's store lives on: keys of groups that were left must not meet those of new ones.
        store, rank, world_size = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        store = dist.PrefixStore(f"megatrain/{next(_generation)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def choose_interface(world_size: int) -> None:
    """Tell Gloo which interface to use, unless the environment does."""
    chosen = gloo_interface(os.environ.get("MASTER_ADDR"), is_one_host=is_one_host(world_size))
    if chosen is not None and VARIABLE not in os.environ:
        os.environ[VARIABLE] = chosen[0]
        logger.debug("%s=%s: %s", VARIABLE, *chosen)


def destroy_groups() -> None:
    """Leave all groups.  Collective over the world; without groups nothing happens."""
    from megatron.core import parallel_state  # noqa: PLC0415 - patched first

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def check_model(mesh: DeviceMesh, provider: Any) -> None:
    """Raise LayoutError unless the mesh can hold the model that `provider` describes."""
    sizes = Sizes(
        heads=provider.num_attention_heads,
        groups=provider.num_query_groups or provider.num_attention_heads,
        layers=provider.num_layers,
        widths={"hidden_size": provider.hidden_size, "ffn": provider.ffn_hidden_size},
        experts=provider.num_moe_experts,
        expert_width=provider.moe_ffn_hidden_size,
    )
    check_fits(sizes, mesh)
