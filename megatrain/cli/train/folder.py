"""A run's output directory: its file names, and what is left of an earlier run."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatrain.errors import ConfigError

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
BEST, LAST = "best", "last"
RESULTS = (
    BEST,
    LAST,
    "metrics.jsonl",
    "data.jsonl",
    "loss.png",
    "config.json",
    "logs",
    "tensorboard",
)
"""What a run writes beside its checkpoints; `overwrite` deletes nothing else."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`output_dir` of one run."""

    root: Path

    @property
    def metrics(self) -> Path:
        """One JSON object a line: a training step, or an evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def positions(self) -> Path:
        """One JSON object for each checkpoint: where the loader stood, and of which data."""
        return self.root / "data.jsonl"

    @property
    def plot(self) -> Path:
        """Loss over steps."""
        return self.root / "loss.png"

    @property
    def config(self) -> Path:
        """The checked configuration with its defaults, as the ranks read it."""
        return self.root / "config.json"

    @property
    def logs(self) -> Path:
        """What ranks other than the first say."""
        return self.root / "logs"

    def prepare(self, *, overwrite: bool, resume: bool) -> None:
        """Make the directory, or clear it of an earlier run.

        Raises ConfigError if an earlier run's results are there and nothing says what to do.
        """
        found = self._results()
        if found and not overwrite and not resume:
            raise ConfigError(
                f"output_dir holds an earlier run: {self.root} has {', '.join(found[:4])}",
                hint='set train.resume = "auto" or train.overwrite = true, or another output_dir',
            )
        if overwrite:
            for name in found:
                _delete(self.root / name)
        self.root.mkdir(parents=True, exist_ok=True)

    def _results(self) -> list[str]:
        if not self.root.is_dir():
            return []
        names = sorted(entry.name for entry in self.root.iterdir())
        return [name for name in names if name in RESULTS or CHECKPOINT.fullmatch(name)]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
