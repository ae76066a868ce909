"""The loss and its statistics over evaluation rows: means over labels or pairs, not batches."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatrain.types import StepOutput

Row = Mapping[str, Any]


def evaluate(
    model: Any,
    batches: Iterable[Sequence[Row]],
    loss_inputs: Callable[[Sequence[Row]], Mapping[str, Any]],
    *,
    is_stopped: Callable[[], bool],
) -> dict[str, float] | None:
    """Return `eval_loss`, `eval_<statistic>` and `eval_seconds`.  Collective.

    None if `is_stopped` before all batches are done: a part of them would be another metric.
    """
    start, means = time.perf_counter(), Means()
    for batch in batches:
        if is_stopped():
            return None
        means.add(model.forward_only(inputs=batch, **loss_inputs(batch)))
    metrics = {f"eval_{name}": value for name, value in means.take().items()}
    return metrics | {"eval_seconds": time.perf_counter() - start}


class Means:
    """Means over several calls, each weighed by what its own mean is over."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, float] = defaultdict(float)

    def add(self, output: StepOutput) -> None:
        """Count one call."""
        self._add("loss", output.loss, output.divisor)
        for name, value in output.statistics.items():
            self._add(name, value, output.counts[name])

    def _add(self, name: str, mean: float, count: float) -> None:
        self._sums[name] += mean * count
        self._counts[name] += count

    def take(self) -> dict[str, float]:
        """Return the means by name."""
        return {name: self._sums[name] / count for name, count in self._counts.items() if count}
