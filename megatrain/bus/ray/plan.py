"""Which mesh, platform and share of a device each group gets; what cannot work is refused."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatrain.config.device_group import DeviceGroup
from megatrain.errors import ConfigError
from megatrain.parallel.layout import DeviceMesh

MAIN = "model"
"""The group that global_device_mesh belongs to, if there are several."""
RESOURCES = {"cuda": "GPU", "npu": "NPU"}
"""What Ray calls a platform's devices, the fastest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a group's ranks are started."""

    group: DeviceGroup
    mesh: DeviceMesh
    platform: str
    share: float = 1.0
    """Of a device, for each rank."""

    @property
    def owner(self) -> str:
        """Name of the group on whose devices it is."""
        return self.group.share_with or self.group.name

    @property
    def device(self) -> str | None:
        """What Ray calls a rank's device; None for a processor."""
        return RESOURCES.get(self.platform)


def make_plans(groups: Any, mesh: DeviceMesh | None, platform: str) -> list[Plan]:
    """Return a plan for each group; without groups, for one called `model`.

    Raises ConfigError, or LayoutError for a mesh of another size than its group.
    """
    checked = _as_groups(groups, mesh)
    _check_names(checked)
    _check_lists(checked)
    by_name = {group.name: group for group in checked}
    for group in checked:
        if group.share_with is not None:
            _check_host(group, by_name)
    main = _main(checked, mesh)
    plans = [
        Plan(
            group=group,
            mesh=_mesh(group, mesh if group is main else None),
            platform=_platform(group, platform),
        )
        for group in checked
    ]
    return [replace(plan, share=_share(plan, plans)) for plan in plans]


def count_cpus(plans: Sequence[Plan]) -> int:
    """Return the cores for all groups: each takes its part beside every rank of its owner."""
    num_ranks = {plan.group.name: plan.group.num_ranks for plan in plans}
    return math.ceil(sum(plan.group.cpus_per_rank * num_ranks[plan.owner] for plan in plans))


def resolve(plans: Sequence[Plan], resources: dict[str, float]) -> list[Plan]:
    """Return the plans with the fastest platform of these resources in place of `auto`."""
    found = [platform for platform, name in RESOURCES.items() if resources.get(name)]
    fastest = (*found, "cpu")[0]
    return [replace(plan, platform=fastest) if plan.platform == "auto" else plan for plan in plans]


def _as_groups(groups: Any, mesh: DeviceMesh | None) -> list[DeviceGroup]:
    if groups is None:
        return [DeviceGroup(MAIN, 1 if mesh is None else mesh.world_size)]
    given = [groups] if isinstance(groups, DeviceGroup) else groups
    is_list = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    if not is_list or not given or any(not isinstance(each, DeviceGroup) for each in given):
        raise ConfigError(
            f"groups must be a list of DeviceGroup: {groups!r}",
            hint="groups=[DeviceGroup(name='model', ranks=4)]",
        )
    return list(given)


def _check_names(groups: Sequence[DeviceGroup]) -> None:
    names = [group.name for group in groups]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"every group must have a name of its own: {', '.join(repeated)} in {names}",
            hint="models find their group by its name: remote_group='model'",
        )


def _check_lists(groups: Sequence[DeviceGroup]) -> None:
    seen: dict[int, str] = {}
    for group in groups:
        if isinstance(group.ranks, int) or group.share_with is not None:
            continue
        for rank in group.ranks:
            if rank in seen:
                raise ConfigError(
                    f"groups {seen[rank]!r} and {group.name!r} both name device {rank}",
                    hint=f"DeviceGroup(name={group.name!r}, share_with={seen[rank]!r}, ...) puts "
                    "them on the same devices",
                )
            seen[rank] = group.name


def _check_host(group: DeviceGroup, by_name: dict[str, DeviceGroup]) -> None:
    host = by_name.get(group.share_with or "")
    rule = f"group {group.name!r} shares devices with {group.share_with!r}, "
    if host is None:
        raise ConfigError(f"{rule}which is no group; known: {', '.join(by_name)}")
    if host.share_with is not None:
        raise ConfigError(
            f"{rule}which has none of its own", hint=f"share_with={host.share_with!r}"
        )
    if group.num_ranks > host.num_ranks or group.platform != host.platform:
        raise ConfigError(
            f"{rule}and must then have as many ranks at most, on the same device_type: "
            f"{group.num_ranks} on {group.platform}, there {host.num_ranks} on {host.platform}"
        )


def _main(groups: Sequence[DeviceGroup], mesh: DeviceMesh | None) -> DeviceGroup | None:
    """Return the group that the global mesh belongs to."""
    if len(groups) == 1:
        return groups[0]
    main = next((group for group in groups if group.name == MAIN), None)
    if mesh is not None and main is None:
        raise ConfigError(
            f"global_device_mesh belongs to the group called {MAIN!r} if there are several: "
            f"{', '.join(group.name for group in groups)}",
            hint="call one so, or give each its mesh: DeviceGroup(..., mesh=DeviceMesh(tp=2))",
        )
    return main


def _mesh(group: DeviceGroup, shared: DeviceMesh | None) -> DeviceMesh:
    own = group.mesh
    if own is not None and shared is not None and own != shared:
        raise ConfigError(
            f"group {group.name!r} has two meshes: its own {own} and global_device_mesh {shared}",
            hint="give one of them",
        )
    found = own if isinstance(own, DeviceMesh) else shared or DeviceMesh(dp=group.num_ranks)
    found.check_world(group.num_ranks)
    return found


def _platform(group: DeviceGroup, platform: str) -> str:
    if "auto" not in (group.platform, platform) and group.platform != platform:
        raise ConfigError(
            f"group {group.name!r} is for {group.device_type}, and initialize for "
            f"platform={platform!r}",
            hint="leave platform out; every group says its own device_type",
        )
    return platform if group.platform == "auto" else group.platform


def _share(plan: Plan, plans: Sequence[Plan]) -> float:
    """Return a rank's share.  Raises ConfigError if the groups on a device ask for more than it."""
    there = [each.group for each in plans if each.owner == plan.owner]
    asked = [group.gpus_per_rank or 1 / len(there) for group in there]
    if sum(asked) > 1 + 1e-9:
        shares = ", ".join(f"{g.name}={a:g}" for g, a in zip(there, asked, strict=True))
        raise ConfigError(
            f"groups on the same devices must ask for one device together at most: {shares}",
            hint="gpus_per_rank of them must add up to 1 or less",
        )
    # Ray counts in steps of 1e-4: three thirds must not be more than one.
    return math.floor((plan.group.gpus_per_rank or 1 / len(there)) * 1e4) / 1e4
