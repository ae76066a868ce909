"""This process among its ranks: platform, groups and seed, joined and left again."""

import gc
import os
from dataclasses import dataclass
from typing import Any

from megatrain.parallel.groups import Groups, destroy_groups, init_groups
from megatrain.parallel.layout import DeviceMesh
from megatrain.platforms.choose import choose_platform, prepare
from megatrain.platforms.platform import Platform


@dataclass(frozen=True, slots=True)
class Session:
    """This process among its ranks."""

    groups: Groups
    platform: Platform
    seed: int


def join(
    mesh: DeviceMesh | None, *, seed: int, platform: str, timeout_s: float, **rendezvous: Any
) -> Session:
    """Join the ranks of a mesh; without one all ranks are data parallel.  Collective.

    `rendezvous` may name a torch.distributed store, rank and world_size for processes that were
    not started by torchrun.  Raises ConfigError, LayoutError or PlatformError before any rank was
    contacted.
    """
    world_size = int(rendezvous.get("world_size") or os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_platform(platform)
    mesh = mesh or DeviceMesh(dp=world_size)
    mesh.check_world(world_size)
    prepare(chosen)
    groups = init_groups(mesh, chosen, seed=seed, timeout_s=timeout_s, **rendezvous)
    return Session(groups, chosen, seed)


def leave() -> None:
    """Leave the ranks.  Collective."""
    # Models are full of cycles, and each that is not collected keeps its groups' threads.
    gc.collect()
    destroy_groups()
    gc.collect()
