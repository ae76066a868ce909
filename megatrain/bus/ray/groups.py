"""Groups of ranks on a Ray cluster, each with its driver: what initialize(mode='ray') calls."""

import logging
from collections import Counter
from contextlib import ExitStack
from typing import Any

from megatrain.bus.driver import Driver
from megatrain.bus.ray.cluster import Cluster
from megatrain.bus.ray.placement import Placement
from megatrain.bus.ray.plan import Plan, count_cpus, make_plans, resolve
from megatrain.bus.ray.ranks import RayRanks
from megatrain.config.bus import BusConfig
from megatrain.errors import ConfigError
from megatrain.parallel.layout import DeviceMesh

logger = logging.getLogger(__name__)


def start_groups(
    groups: Any,
    config: BusConfig,
    *,
    mesh: DeviceMesh | None,
    seed: int,
    platform: str,
    timeout_s: float,
    nproc_per_node: int | None = None,
) -> dict[str, Driver]:
    """Start the ranks of each DeviceGroup; return their drivers by the groups' names.

    `mesh` belongs to the group called `model`, or the only one; other groups without a mesh are
    data parallel.  The cluster is the one that the script has joined by ray.init, or that of
    RAY_ADDRESS (`auto` is the one of this host); else one is started, which ends with the last
    driver.

    With `config.journal` every group has a folder of its own in it.  Snapshots are written by the
    ranks and looked for by the driver: with ranks on other nodes the journal must be a folder that
    all nodes see, and without a journal there are none: lost ranks do all commands anew.

    `nproc_per_node` bounds the ranks of a group on one node.

    Raises ConfigError or LayoutError for groups that cannot work, PlatformError without Ray or
    without room on the cluster, BusError if ranks do not start.  Then none of them runs.
    """
    if config.fork_ranks:
        raise ConfigError("fork_ranks has no effect in mode 'ray': actors start their ranks anew")
    plans = make_plans(groups, mesh, platform)
    with ExitStack() as stack:
        cluster = Cluster(num_cpus=count_cpus(plans))
        stack.callback(cluster.release)
        plans = resolve(plans, cluster.resources)
        placements = _place(plans, cluster, config.connect_timeout_s, stack)
        drivers: dict[str, Driver] = {}
        try:
            for number, plan in enumerate(plans):
                own = _own(config, plan, number)
                placement = placements[plan.owner]
                ranks = RayRanks(placement, plan, own, seed=seed, timeout_s=timeout_s)
                drivers[plan.group.name] = _drive(ranks, placement, plan)
                _check_nodes(plan.group.name, drivers[plan.group.name], nproc_per_node)
        except BaseException:
            for driver in drivers.values():
                driver.close()
            raise
        return drivers


def _place(
    plans: list[Plan], cluster: Cluster, timeout_s: float, stack: ExitStack
) -> dict[str, Placement]:
    """Return where ranks may be, by the group whose devices these are."""
    found = {}
    for owner in [plan for plan in plans if plan.group.share_with is None]:
        name = owner.group.name
        sharing = [plan for plan in plans if plan.group.share_with == name]
        found[name] = Placement(cluster, [owner, *sharing], timeout_s)
        stack.callback(found[name].release)
    return found


def _own(config: BusConfig, plan: Plan, number: int) -> BusConfig:
    """Return the configuration with a journal, and a port for metrics, of the group's own."""
    own: dict[str, Any] = {}
    if config.journal is not None:
        own["journal"] = config.journal / plan.group.name
    if config.metrics_port:
        own["metrics_port"] = config.metrics_port + number
    return config.model_copy(update=own)


def _check_nodes(name: str, driver: Driver, nproc_per_node: int | None) -> None:
    """Raise ConfigError if a node has more ranks of a group than it may have."""
    most = max(Counter(driver.welcome.hosts).values())
    if nproc_per_node is not None and most > nproc_per_node:
        raise ConfigError(
            f"group {name} has {most} ranks on a node, and nproc_per_node is {nproc_per_node}",
            hint="spread it over nodes with strategy='SPREAD', or leave nproc_per_node out",
        )


def _drive(ranks: RayRanks, placement: Placement, plan: Plan) -> Driver:
    try:
        can_snapshot = placement.is_at_home or ranks.config.journal is not None
        driver = Driver(ranks, ranks.config, mesh=None, can_snapshot=can_snapshot)
    except BaseException:
        ranks.close()
        raise
    logger.info(
        "group %s: %d rank(s) on %s, layout %s",
        plan.group.name,
        plan.group.num_ranks,
        ", ".join(sorted(set(driver.welcome.hosts))),
        plan.mesh.describe(),
    )
    return driver
