"""metrics.jsonl: what every step and evaluation gave; which evaluation was best; the plot of it.

The file is the only memory of the past: a run that resumes reads it again up to its step.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError, DataError

Line = dict[str, float]

RISING = ("accurac", "margin", "reward")
"""Parts of names of metrics that are better when greater."""


class History:
    """All lines so far, on every rank; only the rank that `writes` touches the file."""

    def __init__(
        self, path: Path, *, best_metric: str, greater_is_better: bool | None, writes: bool
    ) -> None:
        self._path, self._writes = path, writes
        self._metric = f"eval_{best_metric}"
        if greater_is_better is None:
            greater_is_better = any(part in best_metric for part in RISING)
        self._sign = -1.0 if greater_is_better else 1.0
        self.lines: list[Line] = []

    def add(self, line: Line) -> None:
        """Append a line."""
        self.lines.append(line)
        if self._writes:
            with self._path.open("a") as file:
                file.write(_dump(line) + "\n")

    def go_back(self, step: int, *, source: Path) -> None:
        """Continue after `step`: later lines of `source` are forgotten.

        `source` is metrics.jsonl of the run that is resumed; it may be missing.
        """
        self.lines = [line for line in read_lines(source) if line["step"] <= step]
        if self._writes:
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(_dump(line) + "\n" for line in self.lines))
            partial.replace(self._path)

    @property
    def training(self) -> list[Line]:
        """Lines of training steps."""
        return [line for line in self.lines if "loss" in line]

    @property
    def evaluations(self) -> list[Line]:
        """Lines of evaluations."""
        return [line for line in self.lines if "eval_loss" in line]

    def last_is_best(self) -> bool:
        """Tell whether the last evaluation was better than every one before."""
        return self.evaluations_since_best() == 0

    def evaluations_since_best(self) -> int:
        """Return how many evaluations came after the best one.

        Raises ConfigError if an evaluation has no such metric.
        """
        scores = [self._score(line) for line in self.evaluations]
        best = min(scores, default=math.inf)
        return len(scores) - 1 - scores.index(best) if scores else 0

    def _score(self, line: Line) -> float:
        if self._metric not in line:
            names = [key[5:] for key in line if key.startswith("eval_")]
            raise ConfigError(
                f"train.best_metric must be a metric of the evaluation: {self._metric[5:]!r}",
                hint=f"this loss has {', '.join(sorted(names))}",
            )
        value = line[self._metric]
        return math.inf if math.isnan(value) else self._sign * value


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a metrics.jsonl; none if it is missing.

    A last line without its end, as a killed run leaves it, is passed over.  Raises DataError for
    any other line that is no JSON.
    """
    if not path.is_file():
        return []
    text = path.read_text()
    whole, _, _ = text.rpartition("\n")
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is not JSON: {error}") from error
    return lines


def _dump(line: Mapping[str, Any]) -> str:
    return json.dumps({key: _number(value) for key, value in line.items()})


def _number(value: Any) -> Any:
    """Return whole numbers without a point: steps and tokens are counts."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def plot(history: History, path: Path, *, title: str) -> None:
    """Draw training and evaluation loss over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves = (
        ("loss", history.training, "training"),
        ("eval_loss", history.evaluations, "held out"),
    )
    for key, lines, label in curves:
        if lines:
            marker = "o" if key == "eval_loss" or len(lines) == 1 else ""
            steps, values = [line["step"] for line in lines], [line[key] for line in lines]
            axes.plot(steps, values, marker=marker, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
