"""Join the other ranks, once per process: what `initialize` sets up and a model then uses."""

import gc
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatrain.errors import ConfigError, StateError
from megatrain.log import setup_logging
from megatrain.parallel.layout import DeviceMesh

if TYPE_CHECKING:
    from megatrain.parallel.groups import Groups

logger = logging.getLogger(__name__)

MODES = ("local",)


@dataclass(frozen=True, slots=True)
class Session:
    """This process among its ranks."""

    groups: "Groups"
    platform: Any
    seed: int


_session: Session | None = None


def initialize(
    mode: str = "local",
    *,
    global_device_mesh: DeviceMesh | None = None,
    seed: int = 42,
    platform: str = "auto",
    timeout_s: float = 1800.0,
    **rendezvous: Any,
) -> None:
    """Join the ranks of `global_device_mesh`.  Collective over all ranks.

    mode 'local': every rank runs the same script, under torchrun or alone.  Without a mesh all
    ranks are data parallel.  `seed` decides the initial adapters and dropout.  `platform` is auto,
    cpu, cuda or npu.  `rendezvous` may name a torch.distributed store, rank and world_size for
    processes that were not started by torchrun.

    Raises ConfigError, LayoutError or PlatformError, before any rank was contacted, for options
    that cannot work; StateError if the process has joined already.
    """
    global _session
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if _session is not None:
        raise StateError("megatrain is initialized already", hint="call megatrain.shutdown() first")
    setup_logging()
    from megatrain.platforms.choose import choose_platform, prepare  # noqa: PLC0415 - slow import

    chosen = choose_platform(platform)
    mesh = global_device_mesh or _data_parallel_mesh(rendezvous)
    mesh.check_world(_world_size(rendezvous))
    prepare(chosen)
    from megatrain.parallel.groups import init_groups  # noqa: PLC0415 - slow import

    groups = init_groups(mesh, chosen, seed=seed, timeout_s=timeout_s, **rendezvous)
    _session = Session(groups, chosen, seed)
    if groups.rank == 0:
        logger.info("%d rank(s) on %s, layout %s", mesh.world_size, chosen.name, mesh.describe())


def _world_size(rendezvous: dict[str, Any]) -> int:
    import os  # noqa: PLC0415

    return int(rendezvous.get("world_size") or os.environ.get("WORLD_SIZE", "1"))


def _data_parallel_mesh(rendezvous: dict[str, Any]) -> DeviceMesh:
    return DeviceMesh(dp=_world_size(rendezvous))


def shutdown() -> None:
    """Leave the ranks; `initialize` may be called again.  Collective; harmless when not joined."""
    global _session
    if _session is not None:
        from megatrain.parallel.groups import destroy_groups  # noqa: PLC0415 - slow import

        _session = None
        # Models are full of cycles, and each that is not collected keeps its groups' threads.
        gc.collect()
        destroy_groups()
        gc.collect()


def current_session() -> Session:
    """Return what initialize set up.  Raises StateError if it was not called."""
    if _session is None:
        raise StateError(
            "megatrain is not initialized",
            hint="call megatrain.initialize(mode='local', global_device_mesh=...) first",
        )
    return _session


def joined_session(mesh: DeviceMesh | None) -> Session:
    """Return the session, after `initialize` with defaults and this mesh if there is none.

    Raises ConfigError if there is one with another mesh.
    """
    if _session is None:
        initialize(global_device_mesh=mesh)
    session = current_session()
    if mesh is not None and mesh != session.groups.mesh:
        raise ConfigError(
            f"this process has joined {session.groups.mesh.describe()}, and the model asks for "
            f"{mesh.describe()}",
            hint="leave device_mesh out, or give both the same",
        )
    return session
