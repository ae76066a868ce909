"""data.jsonl: where the loader stood at each checkpoint, and of which data it was.

It lies beside the checkpoints, as metrics.jsonl does: one line for each step that was saved.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.cli.train.history import read_lines
from megatrain.config.run.sections import DataSection
from megatrain.data.loader import DataLoader
from megatrain.errors import ConfigError

logger = logging.getLogger(__name__)

WAY_OUT = "or set train.other_data = true to go on after as many rows of the data that are here"


def write_position(path: Path, *, step: int, loader: Mapping[str, Any], data: DataSection) -> None:
    """Append where the loader stands after `step`."""
    line = {"step": step, "loader": dict(loader), "sources": sources(data)}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def go_to_position(
    loader: DataLoader, path: Path, *, step: int, consumed: int, data: DataSection
) -> None:
    """Let the loader go on where the checkpoint of `step` stands, after `consumed` rows.

    Raises ConfigError, naming it, for another seed, order or other data than the line of that step
    in `path` says.  Without such a line nothing can be compared, and the number decides.
    """
    found = _line_of(path, step, consumed)
    if found is None:
        logger.warning("%s does not know step %d: data and order are not compared", path, step)
        loader.resume_from_checkpoint(consumed)
        return
    if data.streaming and found["sources"] != sources(data):
        raise ConfigError(
            f"the checkpoint is of other data: {found['sources']}, and data.train is "
            f"{sources(data)}",
            hint=f"name the same sources, {WAY_OUT}",
        )
    try:
        loader.resume_from_checkpoint(found["loader"])
    except ConfigError as error:
        hint = WAY_OUT if error.hint is None else f"{error.hint}; {WAY_OUT}"
        raise ConfigError(error.message, hint=hint) from error


def sources(data: DataSection) -> list[dict[str, Any]]:
    """Return the training sources as JSON: all that says what a stream is of."""
    fields = {"dataset_id", "subset_name", "split", "data_slice", "weight"}
    return [
        source.model_dump(mode="json", include=fields, exclude_defaults=True)
        for source in data.train
    ]


def _line_of(path: Path, step: int, consumed: int) -> dict[str, Any] | None:
    lines: list[dict[str, Any]] = read_lines(path)
    of_step = [line for line in lines if line["step"] == step]
    fitting = [line for line in of_step if line["loader"]["consumed_train_samples"] == consumed]
    return fitting[-1] if fitting else None
