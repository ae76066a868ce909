"""The layout of a run: its [mesh], with data parallelism over the ranks that are left."""

from megatrain.config.run import RunConfig
from megatrain.errors import LayoutError
from megatrain.parallel.layout import DeviceMesh


def mesh_of(config: RunConfig, num_ranks: int) -> DeviceMesh:
    """Return the mesh over `num_ranks`.  Raises LayoutError if it does not cover them."""
    sizes = config.mesh.model_dump(exclude={"dp"})
    if num_ranks < 1:
        raise LayoutError(f"there must be at least one rank: {num_ranks}")
    inner = config.mesh.tp * config.mesh.pp * config.mesh.cp
    dp = config.mesh.dp
    if dp is None:
        if num_ranks % inner:
            raise LayoutError(
                "the number of ranks must be a multiple of tp * pp * cp: "
                f"ranks={num_ranks}, tp * pp * cp={inner}",
                hint=f"start {inner} ranks or a multiple, or change [mesh]",
            )
        dp = num_ranks // inner
    mesh = DeviceMesh(dp=dp, **sizes)
    mesh.check_world(num_ranks)
    return mesh
