"""Whether a mesh can hold a model: what must divide what.  Raises LayoutError."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatrain.config.estimate.linears import Mesh
from megatrain.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a model is split over ranks."""

    heads: int
    groups: int
    """Key/value heads."""
    layers: int
    widths: Mapping[str, int | None]
    """By name: what tp splits beside the heads; None is not there."""
    experts: int | None = None
    expert_width: int | None = None


def check_fits(sizes: Sizes, mesh: Mesh) -> None:
    """Raise LayoutError unless every axis divides what it splits."""
    if sizes.heads % mesh.tp:
        raise LayoutError(
            f"tp must divide the number of attention heads: tp={mesh.tp}, heads={sizes.heads}"
        )
    if sizes.groups % mesh.tp and mesh.tp % sizes.groups:
        raise LayoutError(
            "tp must divide the number of key/value heads or be a multiple of it: "
            f"tp={mesh.tp}, key/value heads={sizes.groups}"
        )
    if sizes.layers % (mesh.pp * mesh.vpp):
        raise LayoutError(
            f"pp * vpp must divide the number of layers: pp={mesh.pp}, vpp={mesh.vpp}, "
            f"layers={sizes.layers}"
        )
    for name, size in sizes.widths.items():
        if size is not None and size % mesh.tp:
            raise LayoutError(f"tp must divide {name}: tp={mesh.tp}, {name}={size}")
    _check_experts(sizes, mesh)


def _check_experts(sizes: Sizes, mesh: Mesh) -> None:
    if not sizes.experts:
        if mesh.ep > 1 or mesh.etp > 1:
            raise LayoutError(
                f"the model has no experts: ep={mesh.ep}, etp={mesh.etp}", hint="use ep=1, etp=1"
            )
        return
    count, width = sizes.experts, sizes.expert_width
    if count % mesh.ep:
        raise LayoutError(f"ep must divide the number of experts: ep={mesh.ep}, experts={count}")
    if width is not None and width % mesh.etp:
        raise LayoutError(f"etp must divide the experts' width: etp={mesh.etp}, width={width}")
