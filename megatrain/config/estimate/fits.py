"""Whether a mesh can hold a model: what must divide what.  Raises LayoutError."""

from megatrain.config.estimate.linears import Mesh
from megatrain.config.estimate.model import ModelShape
from megatrain.errors import LayoutError


def check_fits(shape: ModelShape, mesh: Mesh) -> None:
    """Raise LayoutError unless every axis divides what it splits."""
    if shape.heads % mesh.tp:
        raise LayoutError(
            f"tp must divide the number of attention heads: tp={mesh.tp}, heads={shape.heads}"
        )
    if shape.groups % mesh.tp and mesh.tp % shape.groups:
        raise LayoutError(
            "tp must divide the number of key/value heads or be a multiple of it: "
            f"tp={mesh.tp}, key/value heads={shape.groups}"
        )
    if shape.layers % (mesh.pp * mesh.vpp):
        raise LayoutError(
            f"pp * vpp must divide the number of layers: pp={mesh.pp}, vpp={mesh.vpp}, "
            f"layers={shape.layers}"
        )
    for name, size in (("hidden_size", shape.hidden), ("intermediate_size", shape.ffn)):
        if size % mesh.tp:
            raise LayoutError(f"tp must divide {name}: tp={mesh.tp}, {name}={size}")
    _check_experts(shape, mesh)


def _check_experts(shape: ModelShape, mesh: Mesh) -> None:
    if shape.experts is None:
        if mesh.ep > 1 or mesh.etp > 1:
            raise LayoutError(
                f"the model has no experts: ep={mesh.ep}, etp={mesh.etp}", hint="use ep=1, etp=1"
            )
        return
    count, width = shape.experts.count, shape.experts.ffn
    if count % mesh.ep:
        raise LayoutError(f"ep must divide the number of experts: ep={mesh.ep}, experts={count}")
    if width % mesh.etp:
        raise LayoutError(f"etp must divide the experts' width: etp={mesh.etp}, width={width}")
