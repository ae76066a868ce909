"""Training metrics of one adapter since they were last asked for."""

from collections.abc import Sequence

from megatrain.types import InputFeature, StepOutput


class Metrics:
    """Sums over the calls since the last report."""

    def __init__(self) -> None:
        self.grad_norm: float | None = None
        self._reset()

    def _reset(self) -> None:
        self.loss_sum, self.label_tokens, self.tokens, self.seconds = 0.0, 0, 0, 0.0

    def add(self, output: StepOutput, inputs: Sequence[InputFeature], seconds: float) -> None:
        """Count one forward_backward."""
        self.loss_sum += output.loss * output.num_tokens
        self.label_tokens += output.num_tokens
        self.tokens += sum(len(item["input_ids"]) for item in inputs)
        self.seconds += seconds

    def take(self) -> dict[str, float]:
        """Return means and sums, and start anew."""
        result = {"tokens": float(self.tokens), "label_tokens": float(self.label_tokens)}
        if self.label_tokens:
            result["loss"] = self.loss_sum / self.label_tokens
            result["tokens_per_second"] = self.tokens / self.seconds
        if self.grad_norm is not None:
            result["grad_norm"] = self.grad_norm
        self._reset()
        return result
