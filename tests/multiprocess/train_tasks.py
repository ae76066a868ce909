"""What ranks do for the tests of `megatrain train`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatrain.cli.train.dry_run import dry_run
from megatrain.cli.train.job import run_joined
from megatrain.config.run import parse
from megatrain.data.input_processor import InputProcessor
from megatrain.model.patch import Patch
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


class ScaledEmbedding(Patch):
    """Multiplies what tokens are embedded as."""

    name = "scaled embedding"
    reason = "to see that it happened"

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def apply(self, model: Any) -> None:
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                if "word_embeddings" in name:
                    parameter.data *= self.factor


def train(values: dict[str, Any], overrides: Sequence[str] = ()) -> int:
    """Run a configuration on ranks that have joined; return its exit status."""
    config = parse(values, overrides)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)  # the command's part
    return run_joined(config)


def train_error(values: dict[str, Any], overrides: Sequence[str] = ()) -> Any:
    """Return the error of a run, with its hint."""
    return error_of(lambda: train(values, overrides))


def train_errors(values: dict[str, Any], mistakes: Sequence[Sequence[str]]) -> list[Any]:
    """Return the error of a run with each of several overrides."""
    return [train_error(values, overrides) for overrides in mistakes]


def dry_run_errors(values: dict[str, Any], mistakes: Sequence[Sequence[str]]) -> list[Any]:
    """Return the error of a dry run with each of several overrides."""
    return [
        error_of(lambda overrides=overrides: dry_run(parse(values, overrides), num_ranks=1))
        for overrides in mistakes
    ]
