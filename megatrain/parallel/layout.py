"""How ranks are laid out over TP, PP, CP, EP and DP.  Pure arithmetic: no torch, no processes.

Megatron's order is used throughout: tp fastest, then cp, dp, pp.  Experts have an order of their
own over the same ranks: etp fastest, then ep, edp, pp.  `ep` therefore divides dp * cp * tp and
does not multiply the world.  Neither does `fsdp`, which divides dp: its ranks are neighbours there.
"""

import math
from dataclasses import asdict, dataclass

from megatrain.errors import LayoutError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMesh:
    """Sizes of the parallel axes.  `world_size` is dp * tp * pp * cp."""

    dp: int = 1
    """Data parallel ranks: those that see other data."""
    tp: int = 1
    """Tensor parallel ranks; sequence parallelism comes with it."""
    pp: int = 1
    """Pipeline stages."""
    cp: int = 1
    """Context parallel ranks: each holds two zig-zag chunks of every sequence."""
    ep: int = 1
    """Expert parallel ranks, taken out of dp * cp * tp."""
    etp: int = 1
    """Tensor parallel ranks inside one expert."""
    vpp: int = 1
    """Model chunks per pipeline stage; above 1 the interleaved schedule is used."""
    fsdp: int = 1
    """Ranks, out of dp, over which parameters, gradients and optimizer are sharded; the dp / fsdp
    groups of them are replicas of each other."""

    def __post_init__(self) -> None:
        for axis, size in asdict(self).items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise LayoutError(f"every size of a mesh must be an integer >= 1: {axis}={size!r}")
        ranks = self.dp * self.cp * self.tp
        if ranks % (self.ep * self.etp):
            raise LayoutError(
                "ep * etp must divide dp * cp * tp: "
                f"ep={self.ep}, etp={self.etp}, dp={self.dp}, cp={self.cp}, tp={self.tp}",
                hint=f"choose ep * etp among the divisors of {ranks}",
            )
        if self.vpp > 1 and self.pp == 1:
            raise LayoutError(
                f"interleaving needs at least two pipeline stages: vpp={self.vpp}, pp={self.pp}"
            )
        self._check_fsdp()

    def _check_fsdp(self) -> None:
        if self.dp % self.fsdp:
            raise LayoutError(f"fsdp must divide dp: fsdp={self.fsdp}, dp={self.dp}")
        if self.fsdp > 1 and self.tp * self.cp % (self.ep * self.etp):
            raise LayoutError(
                "with fsdp the experts must be spread over tp * cp ranks alone, so that the fsdp "
                f"ranks hold the same ones: fsdp={self.fsdp}, ep={self.ep}, etp={self.etp}, "
                f"tp={self.tp}, cp={self.cp}",
                hint=f"choose ep * etp among the divisors of {self.tp * self.cp}, or fsdp=1",
            )

    @classmethod
    def from_sizes(
        cls,
        *,
        dp_size: int | None = None,
        tp_size: int = 1,
        pp_size: int = 1,
        cp_size: int = 1,
        ep_size: int = 1,
        etp_size: int = 1,
        vpp_size: int = 1,
        fsdp_size: int = 1,
        world_size: int | None = None,
    ) -> "DeviceMesh":
        """Build a mesh of dp_size * fsdp_size data parallel ranks.

        `dp_size` is what is left of `world_size` when it is not given.  Raises LayoutError when
        the sizes do not multiply to `world_size`.
        """
        inner = tp_size * pp_size * cp_size * fsdp_size
        if dp_size is None:
            if world_size is not None and (inner < 1 or world_size % inner):
                sizes = {"tp": tp_size, "pp": pp_size, "cp": cp_size, "fsdp": fsdp_size}
                raise LayoutError(_product_message(world_size, sizes))
            dp_size = 1 if world_size is None else world_size // inner
        mesh = cls(
            dp=_product(dp_size, fsdp_size),
            fsdp=fsdp_size,
            tp=tp_size,
            pp=pp_size,
            cp=cp_size,
            ep=ep_size,
            etp=etp_size,
            vpp=vpp_size,
        )
        if world_size is not None:
            mesh.check_world(world_size)
        return mesh

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    def check_world(self, world_size: int) -> None:
        """Raise LayoutError unless this mesh covers exactly `world_size` ranks."""
        if self.world_size != world_size:
            raise LayoutError(
                f"world size must be dp * tp * pp * cp: world={world_size}, dp={self.dp}, "
                f"tp={self.tp}, pp={self.pp}, cp={self.cp} (product {self.world_size})",
                hint=f"start {self.world_size} ranks, or change the mesh",
            )

    def describe(self) -> str:
        """Name the axes larger than one, as in `tp2·pp2`; `1` for a single rank."""
        sizes = [f"{axis}{size}" for axis, size in asdict(self).items() if size > 1]
        return "·".join(sizes) or "1"

    def to_dict(self) -> dict[str, int]:
        """Sizes by axis name, for a report."""
        return asdict(self)


def _product(dp_size: int, fsdp_size: int) -> int:
    """Return all data parallel ranks; a size that is none is left for the mesh to name."""
    fits = all(type(size) is int and size >= 1 for size in (dp_size, fsdp_size))
    return dp_size * fsdp_size if fits else dp_size


def _product_message(world: int, sizes: dict[str, int]) -> str:
    used = {axis: size for axis, size in sizes.items() if axis != "fsdp" or size != 1}
    values = ", ".join(f"{axis}={size}" for axis, size in used.items())
    return (
        f"world size must be a multiple of {' * '.join(used)}: "
        f"world={world}, {values} (product {math.prod(used.values())})"
    )
