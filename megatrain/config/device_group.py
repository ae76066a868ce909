"""A named group of ranks on a Ray cluster, and what each rank takes of its node.  No torch."""

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Protocol, runtime_checkable

from megatrain.errors import ConfigError

DEVICE_TYPES = ("auto", "cpu", "cuda", "npu")
STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
"""Ray's own names: on few nodes, on many, on one, on as many as there are ranks."""


@runtime_checkable
class Mesh(Protocol):
    """What a group asks of a DeviceMesh, which belongs to a layer above this one."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    def check_world(self, world_size: int) -> None:
        """Raise LayoutError unless the mesh covers exactly so many ranks."""


@dataclass(frozen=True, slots=True)
class DeviceGroup:
    """Ranks that run one set of models, each on a device of its own.

    Raises ConfigError for values that cannot work, LayoutError for a mesh of another size.
    """

    name: str
    """What `remote_group` of a model says."""
    ranks: int | Sequence[int]
    """How many; of a list, its length: which devices these are is for Ray to say."""
    _: KW_ONLY
    device_type: str = "auto"
    """auto (the fastest that the cluster has), cpu, cuda (also called GPU) or npu."""
    mesh: Mesh | None = None
    """A DeviceMesh; None: global_device_mesh for the main group, data parallel for others."""
    gpus_per_rank: float | None = None
    """Share of its device that a rank is counted with, at most 1.  None: an equal share for each
    group on these devices.  It is no bound of memory: that is for the programs to keep."""
    cpus_per_rank: float = 1.0
    """Cores that Ray sets aside for a rank; also the number of its threads for small sums."""
    share_with: str | None = None
    """Another group, whose devices this one uses too: rank i those of rank i there."""
    strategy: str = "PACK"
    """How Ray spreads the ranks over nodes: one of STRATEGIES."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ConfigError(
                f"a group's name must be letters, digits, '_' and '-': {self.name!r}",
                hint="DeviceGroup(name='model', ranks=4)",
            )
        self._check_ranks()
        self._choice("device_type", self.device_type, (*DEVICE_TYPES, "gpu"))
        self._choice("strategy", self.strategy, STRATEGIES)
        if not _is_between(self.cpus_per_rank, 0, 1 << 16):
            self._refuse("cpus_per_rank", self.cpus_per_rank, "a number from 0 on", "1 is usual")
        self._check_share()
        self._check_mesh()

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return self.ranks if isinstance(self.ranks, int) else len(self.ranks)

    @property
    def platform(self) -> str:
        """Name of the platform of this kind of device."""
        kind = self.device_type.lower()
        return "cuda" if kind == "gpu" else kind

    def _check_ranks(self) -> None:
        if isinstance(self.ranks, int) and not isinstance(self.ranks, bool) and self.ranks >= 1:
            return
        is_list = isinstance(self.ranks, Sequence) and not isinstance(self.ranks, str | bytes)
        each = list(self.ranks) if is_list else []  # type: ignore[arg-type]
        if not each or any(type(rank) is not int or rank < 0 for rank in each):
            self._refuse("ranks", self.ranks, "a number >= 1, or a list of numbers", "ranks=4")
        if len(set(each)) < len(each):
            self._refuse("ranks", self.ranks, "a list without repetition", "ranks=4")

    def _choice(self, field: str, value: object, known: tuple[str, ...]) -> None:
        names = {name.lower() for name in known}
        if not isinstance(value, str) or value.lower() not in names:
            self._refuse(field, value, "one of " + ", ".join(known), "leave it out for the default")

    def _check_share(self) -> None:
        share = self.gpus_per_rank
        if share is not None and (not _is_between(share, 0, 1) or not share):
            self._refuse(
                "gpus_per_rank",
                share,
                "above 0 and at most 1, since a rank uses one device",
                "more devices are more ranks; 0.5 leaves room for a group that shares them",
            )
        if self.share_with == self.name:
            self._refuse("share_with", self.share_with, "another group's name", "leave it out")

    def _check_mesh(self) -> None:
        if self.mesh is None:
            return
        if not isinstance(self.mesh, Mesh):
            self._refuse("mesh", self.mesh, "a DeviceMesh", "mesh=DeviceMesh(tp=2, dp=2)")
        self.mesh.check_world(self.num_ranks)

    def _refuse(self, field: str, value: object, rule: str, hint: str) -> None:
        raise ConfigError(f"{field} of group {self.name!r} must be {rule}: {value!r}", hint=hint)


def _is_between(value: object, lowest: float, highest: float) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and lowest <= float(value) <= highest  # type: ignore[arg-type]
