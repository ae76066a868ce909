"""What ranks do for the tests of `megatrain train`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatrain.cli.train.job import run_joined
from megatrain.config.run import parse
from megatrain.data.input_processor import InputProcessor
from megatrain.types import InputFeature
from tests.multiprocess.tasks import error_of


class LastLabels(InputProcessor):
    """Trains on the last few tokens of each row."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[InputFeature]:
        data = super().__call__([dict(row) for row in rows])
        for datum in data:
            ids = list(datum["input_ids"])
            datum["labels"] = [-100] * (len(ids) - self.count) + ids[-self.count :]
        return data


def train(values: dict[str, Any], overrides: Sequence[str] = ()) -> int:
    """Run a configuration on ranks that have joined; return its exit status."""
    config = parse(values, overrides)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)  # the command's part
    return run_joined(config)


def train_error(values: dict[str, Any], overrides: Sequence[str] = ()) -> Any:
    """Return the error of a run, with its hint."""
    return error_of(lambda: train(values, overrides))
