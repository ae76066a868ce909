"""How this process reaches its ranks: as one of them, or as the driver of others.  No torch."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatrain.bus.commands import OpenModel
from megatrain.config.bus import BusConfig
from megatrain.errors import ConfigError, StateError
from megatrain.log import setup_logging
from megatrain.parallel.layout import DeviceMesh

if TYPE_CHECKING:
    from megatrain.bus.driver import Driver
    from megatrain.parallel.joined import Session

logger = logging.getLogger(__name__)

MODES = ("local", "driver", "ray")


@dataclass(frozen=True, slots=True)
class Remote:
    """Drivers of the ranks, by the name of their group."""

    drivers: "dict[str, Driver]"

    def driver(self, group: str | None) -> "Driver":
        """Return the driver of a group; the only one, or that of `model`, if none is named."""
        name = group or ("model" if len(self.drivers) > 1 else next(iter(self.drivers)))
        if name not in self.drivers:
            raise ConfigError(
                f"there is no group of ranks called {name!r}; known: {', '.join(self.drivers)}"
            )
        return self.drivers[name]


_session: "Session | None" = None
_remote: Remote | None = None


def initialize(
    mode: str = "local",
    *,
    global_device_mesh: DeviceMesh | None = None,
    seed: int = 42,
    platform: str = "auto",
    timeout_s: float = 1800.0,
    nproc_per_node: int | None = None,
    address: str | None = None,
    groups: Any = None,
    **options: Any,
) -> None:
    """Reach the ranks of `global_device_mesh`.

    mode 'local': every rank runs the same script, under torchrun or alone; collective over all of
    them.  Without a mesh all ranks are data parallel.  `options` may name a torch.distributed
    store, rank and world_size for processes that were not started by torchrun.

    mode 'driver': one script; the ranks are `nproc_per_node` processes that are started on this
    host and end with it, or those of `megatrain worker` at `address` (tcp://HOST:PORT or
    unix:/path).  mode 'ray': actors of a Ray cluster, in `groups` of DeviceGroup, at most
    `nproc_per_node` of a group on a node.  `options` are fields of megatrain.config.bus.BusConfig.

    `seed` decides the initial adapters and dropout, `platform` is auto, cpu, cuda or npu, and
    `timeout_s` bounds a collective; ranks at an address have their own.

    Raises ConfigError, LayoutError or PlatformError, before any rank was contacted, for options
    that cannot work; StateError if the process has ranks already; BusError if they cannot be
    reached.
    """
    global _session, _remote
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if _session is not None or _remote is not None:
        raise StateError("megatrain is initialized already", hint="call megatrain.shutdown() first")
    setup_logging()
    if mode == "local":
        _refuse(mode, nproc_per_node=nproc_per_node, address=address, groups=groups)
        _session = _join(global_device_mesh, seed, platform, timeout_s, options)
        return
    try:
        config = BusConfig(**options)
    except ValidationError as error:
        raise ConfigError(f"mode {mode!r} does not take these options: {error}") from error
    ranks = _Ranks(global_device_mesh, seed, platform, timeout_s)
    if mode == "ray":
        _refuse(mode, address=address)
        from megatrain.bus.ray.groups import start_groups  # noqa: PLC0415 - ray is an extra

        settings = ranks.settings() | {"nproc_per_node": nproc_per_node}
        _remote = Remote(start_groups(groups, config, mesh=global_device_mesh, **settings))
    else:
        _refuse(mode, groups=groups)
        _remote = Remote({"model": _drive(ranks, nproc_per_node, address, config)})


@dataclass(frozen=True, slots=True)
class _Ranks:
    """What ranks that are started here are told."""

    mesh: DeviceMesh | None
    seed: int
    platform: str
    timeout_s: float

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "platform": self.platform, "timeout_s": self.timeout_s}


def _refuse(mode: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} has no effect in mode {mode!r}: {value!r}")


def _join(
    mesh: DeviceMesh | None, seed: int, platform: str, timeout_s: float, rendezvous: dict[str, Any]
) -> "Session":
    from megatrain.parallel.joined import join  # noqa: PLC0415 - imports torch and Megatron

    known = {"store", "rank", "world_size"}
    if unknown := sorted(rendezvous.keys() - known):
        raise ConfigError(f"mode 'local' does not take {unknown}; it takes {sorted(known)}")
    session = join(mesh, seed=seed, platform=platform, timeout_s=timeout_s, **rendezvous)
    if session.groups.rank == 0:
        joined = session.groups.mesh
        what = (joined.world_size, session.platform.name, joined.describe())
        logger.info("%d rank(s) on %s, layout %s", *what)
    return session


def _drive(
    ranks: _Ranks, nproc_per_node: int | None, address: str | None, config: BusConfig
) -> "Driver":
    from megatrain.bus.driver import Driver  # noqa: PLC0415 - not needed in mode 'local'
    from megatrain.bus.local_ranks import LocalRanks  # noqa: PLC0415

    if address is not None:
        _refuse("driver with an address", nproc_per_node=nproc_per_node)
        return Driver.connect(address, config, mesh=ranks.mesh)
    mesh = ranks.mesh or DeviceMesh(dp=nproc_per_node or 1)
    if nproc_per_node is not None:
        mesh.check_world(nproc_per_node)
    return Driver.launch(LocalRanks(mesh, config, **ranks.settings()), config)


def shutdown() -> None:
    """Leave the ranks, or end those that were started; `initialize` may be called again.

    Collective in mode 'local'; harmless when there are none.
    """
    global _session, _remote
    if _session is not None:
        from megatrain.parallel.joined import leave  # noqa: PLC0415 - slow import

        _session = None
        leave()
    if _remote is not None:
        remote, _remote = _remote, None
        for driver in remote.drivers.values():
            driver.close()


def current_session() -> "Session":
    """Return what initialize(mode='local') set up.  Raises StateError if it was not called."""
    if _session is None:
        raise StateError(
            "this process is not one of the ranks",
            hint="call megatrain.initialize(mode='local', global_device_mesh=...) first",
        )
    return _session


def joined_session(mesh: DeviceMesh | None) -> "Session":
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


def current_remote() -> Remote | None:
    """Return the ranks that this process drives; None in mode 'local'."""
    return _remote


def open_model(command: OpenModel, mesh: DeviceMesh | None, group: str | None) -> Any:
    """Return what runs a model's commands: on this rank, or on the ranks of a group."""
    if _remote is not None:
        from megatrain.api.remote_model import RemoteModel  # noqa: PLC0415 - not in mode 'local'

        return RemoteModel(command, _remote.driver(group))
    session = joined_session(mesh)
    if group is not None:
        _refuse("local", remote_group=group)
    from megatrain.api.local_model import LocalModel  # noqa: PLC0415 - imports torch and Megatron

    return LocalModel(command, session)
