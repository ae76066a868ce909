"""Where the ranks of groups on the same devices may run: a bundle of a placement group for each."""

import importlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.bus.ray.cluster import Cluster
from megatrain.bus.ray.plan import Plan
from megatrain.errors import PlatformError

logger = logging.getLogger(__name__)

NO_NODE_COMES_S = 10.0
"""Seconds for Ray to place ranks on a cluster that no node will join."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """One rank's part of a node."""

    index: int
    """In the placement group."""
    node: str
    """Empty while Ray looks for another one."""


class Placement:
    """A placement group, as long as somebody holds it; held by whoever makes it."""

    def __init__(self, cluster: Cluster, plans: Sequence[Plan], timeout_s: float) -> None:
        """Set room aside for the first plan's group and the others, which share its devices.

        Raises PlatformError if there is none in time.
        """
        # `from ray.util import placement_group` would give a function of that name.
        api = importlib.import_module("ray.util.placement_group")
        self.cluster, self._api = cluster, api
        self._holders, self._lock = 1, threading.Lock()
        group = plans[0].group
        each = _resources(plans)
        self._size = group.num_ranks
        self._group = api.placement_group([each] * self._size, strategy=group.strategy.upper())
        wait_s = min(timeout_s, NO_NODE_COMES_S) if cluster.is_local else timeout_s
        if not self._group.wait(wait_s):
            api.remove_placement_group(self._group)
            raise PlatformError(
                f"Ray has no room for group {group.name!r} after {wait_s:g} s: {self._size} times "
                f"{each}, {group.strategy}; the cluster has {_shown(cluster.resources)} in all",
                hint="start fewer ranks, stop what else runs there, or let groups share devices: "
                "DeviceGroup(..., share_with='model')",
            )
        cluster.hold()

    def bundles(self) -> list[Bundle]:
        """Return the bundles by rank: neighbours on one node, the driver's node first."""
        table = self._api.placement_group_table(self._group)["bundles_to_node_id"]
        home = self.cluster.home
        bundles = [Bundle(index, str(table.get(index, ""))) for index in range(self._size)]
        return sorted(bundles, key=lambda each: (each.node != home, each.node, each.index))

    @property
    def is_at_home(self) -> bool:
        """Tell whether all ranks are on the driver's node."""
        return {each.node for each in self.bundles()} == {self.cluster.home}

    def strategy(self, bundle: Bundle) -> Any:
        """Return what puts an actor there."""
        from ray.util.scheduling_strategies import (  # noqa: PLC0415 - ray is an extra
            PlacementGroupSchedulingStrategy,
        )

        return PlacementGroupSchedulingStrategy(self._group, bundle.index)

    def hold(self) -> None:
        """Keep it until `release` is called once more."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """Give the room back if nobody else holds it."""
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
        if self.cluster.is_there:
            self._api.remove_placement_group(self._group)
        self.cluster.release()


def _resources(plans: Sequence[Plan]) -> dict[str, float]:
    """Return one bundle: a whole device, so that no two ranks of a group get the same one."""
    cpus = sum(plan.group.cpus_per_rank for plan in plans)
    device = plans[0].device
    found = {"CPU": cpus} if cpus else {}
    return found if device is None else found | {device: 1.0}


def _shown(resources: dict[str, float]) -> str:
    known = ("CPU", "GPU", "NPU")
    return ", ".join(f"{resources[name]:g} {name}" for name in known if name in resources)
