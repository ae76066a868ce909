"""Training metrics of one adapter since they were last asked for."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from megatrain.types import StepOutput


class Metrics:
    """Sums over the calls since the last report."""

    def __init__(self, utilisation: Callable[..., float | None] | None = None) -> None:
        """`utilisation` says the mfu of so many tokens, squares and seconds, if it is known."""
        self._utilisation = utilisation
        self.grad_norm: float | None = None
        self._reset()

    def _reset(self) -> None:
        self.loss_sum, self.divisor = 0.0, 0.0
        self.label_tokens, self.tokens, self.squares, self.seconds = 0, 0, 0.0, 0.0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, float] = defaultdict(float)

    def add(self, output: StepOutput, seconds: float) -> None:
        """Count one forward_backward."""
        self.loss_sum += output.loss * output.divisor
        self.divisor += output.divisor
        self.label_tokens += output.num_tokens
        self.tokens += sum(map(len, output.logps))
        self.squares += output.squares
        self.seconds += seconds
        for name, value in output.statistics.items():
            self.sums[name] += value * output.counts[name]
            self.counts[name] += output.counts[name]

    def to_dict(self) -> dict[str, Any]:
        """Return what is counted, for load_dict."""
        kept = {name: value for name, value in vars(self).items() if name != "_utilisation"}
        return kept | {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_dict(self, kept: dict[str, Any]) -> None:
        """Go on from what to_dict returned."""
        vars(self).update(kept)
        self.sums = defaultdict(float, kept["sums"])
        self.counts = defaultdict(float, kept["counts"])

    def take(self) -> dict[str, float]:
        """Return means and sums, and start anew."""
        result = {"tokens": float(self.tokens), "label_tokens": float(self.label_tokens)}
        if self.divisor:
            result["loss"] = self.loss_sum / self.divisor
            result["tokens_per_second"] = self.tokens / self.seconds
            result |= self._mfu()
        result |= {name: total / self.counts[name] for name, total in self.sums.items()}
        if self.grad_norm is not None:
            result["grad_norm"] = self.grad_norm
        self._reset()
        return result

    def _mfu(self) -> dict[str, float]:
        if self._utilisation is None:
            return {}
        mfu = self._utilisation(tokens=self.tokens, squares=self.squares, seconds=self.seconds)
        return {} if mfu is None else {"mfu": mfu}
