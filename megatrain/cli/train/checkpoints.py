"""A run's checkpoints: saved with the place in the data, the oldest deleted."""

from megatrain.cli.train.folder import BEST, LAST
from megatrain.cli.train.position import write_position
from megatrain.cli.train.run import Run
from megatrain.export.state.retention import prune


def save(run: Run, name: str, *, background: bool = False) -> str:
    """Save a checkpoint that can be resumed.  Collective."""
    state = run.loader.get_state()
    if run.ranks.is_first:
        write_position(run.folder.positions, step=run.done, loader=state, data=run.config.data)
    path: str = run.model.save(
        name,
        output_dir=run.folder.root,
        save_optimizer=True,
        consumed_train_samples=state["consumed_train_samples"],
        background=background,
    )
    return path


def keep_newest(run: Run) -> None:
    """Delete older checkpoints; one that is still being written does not count yet."""
    keep = run.config.train.keep
    if keep is not None and run.ranks.is_first:
        prune(run.folder.root, keep, spare=(BEST, LAST))
