"""Which rank is where: one table for a log."""

from megatrain.api.session import joined_session
from megatrain.parallel.layout import DeviceMesh


def get_device_placement() -> str:
    """Return a table of ranks: device, and place on each axis of the mesh that is larger than 1.

    Joins the other ranks as a model would if `initialize` was not called.
    """
    session = joined_session(None)
    groups, mesh = session.groups, session.groups.mesh
    axes = [axis for axis in ("pp", "dp", "cp", "tp") if getattr(mesh, axis) > 1]
    lines = [f"{mesh.world_size} rank(s), {groups.device.type}, layout {mesh.describe()}"]
    for rank in range(mesh.world_size):
        place = coordinates(mesh, rank)
        where = " ".join(f"{axis}={place[axis]}" for axis in axes)
        here = "  <- this process" if rank == groups.rank else ""
        lines.append(f"  rank {rank}: {where}{here}".rstrip())
    return "\n".join(lines)


def coordinates(mesh: DeviceMesh, rank: int) -> dict[str, int]:
    """Return a rank's place on each axis: tp fastest, then cp, dp, pp."""
    place = {}
    for axis in ("tp", "cp", "dp", "pp"):
        rank, place[axis] = divmod(rank, getattr(mesh, axis))
    return place
