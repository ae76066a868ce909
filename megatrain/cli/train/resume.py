"""Going on where a checkpoint stands: weights, optimizer, schedule, data, and the run's history."""

from pathlib import Path
from typing import Any

from megatrain.cli.train.folder import RunFolder
from megatrain.cli.train.history import History
from megatrain.cli.train.position import go_to_position
from megatrain.cli.train.ranks import Ranks
from megatrain.config.run import RunConfig
from megatrain.data.loader import DataLoader
from megatrain.errors import ConfigError
from megatrain.export.state.retention import latest_state


def resume(
    config: RunConfig,
    folder: RunFolder,
    ranks: Ranks,
    model: Any,
    loader: DataLoader,
    history: History,
) -> int:
    """Restore what the configuration asks for; return the optimizer steps done.  Collective.

    Raises ConfigError for other data, or another order of them, than the checkpoint was trained on.
    """
    checkpoint = _chosen(config, folder, ranks)
    if checkpoint is None:
        return 0
    state = model.resume_from_checkpoint(checkpoint)
    if state["consumed_train_samples"] is None:
        raise ConfigError(
            f"{checkpoint} does not say how many rows were trained on",
            hint="save(..., consumed_train_samples=...) does; megatrain train always does",
        )
    step, consumed = int(state["cur_step"]), int(state["consumed_train_samples"])
    if config.train.other_data:
        loader.resume_from_checkpoint(consumed)
    else:
        path = checkpoint.parent / folder.positions.name
        go_to_position(loader, path, step=step, consumed=consumed, data=config.data)
    history.go_back(step, source=checkpoint.parent / folder.metrics.name)
    ranks.wait()
    return step


def _chosen(config: RunConfig, folder: RunFolder, ranks: Ranks) -> Path | None:
    """Return the checkpoint to go on from; the first rank chooses.  Collective."""
    section = config.train
    if section.resume == "none":
        return None
    if section.resume != "auto":
        return Path(section.resume).expanduser()
    found = None
    if ranks.is_first:
        found = latest_state(folder.root, skip_broken=section.skip_damaged)
    name = ranks.from_first("" if found is None else found.name)
    return folder.root / name if name else None
