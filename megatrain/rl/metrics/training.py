"""Loss, token accuracy and gradient norm of training steps."""

from typing import Any

from megatrain.rl.metric import Metric
from megatrain.types import StepOutput


class LossMetric(Metric):
    """Loss over all calls, each weighted by its divisor, and the number of label tokens.

    The divisor is what the loss is a mean over: labels, sequences or pairs.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sum, self._divisor, self._tokens = 0.0, 0.0, 0

    def accumulate(self, inputs: Any, outputs: StepOutput) -> None:
        """Add one call's loss."""
        self._sum += outputs.loss * outputs.divisor
        self._divisor += outputs.divisor
        self._tokens += outputs.num_tokens

    def calculate(self) -> dict[str, float]:
        """Return loss and label_tokens."""
        if not self._divisor:
            return {}
        return {"loss": self._sum / self._divisor, "label_tokens": float(self._tokens)}


class TokenAccuracyMetric(Metric):
    """The share of label tokens that no other token is likelier than."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._correct, self._tokens = 0.0, 0

    def accumulate(self, inputs: Any, outputs: StepOutput) -> None:
        """Add one call; one whose output has no token_accuracy does not count."""
        share = outputs.statistics.get("token_accuracy")
        if share is not None:
            self._correct += share * outputs.num_tokens
            self._tokens += outputs.num_tokens

    def calculate(self) -> dict[str, float]:
        """Return token_accuracy."""
        return {"token_accuracy": self._correct / self._tokens} if self._tokens else {}


class GradNormMetric(Metric):
    """Norm of the gradient before clipping: mean and largest over steps."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._norms: list[float] = []

    def accumulate(
        self, inputs: Any = None, outputs: Any = None, *, grad_norm: float | None
    ) -> None:
        """Add one step; None, as clip_grad_and_step returns between steps, does not count."""
        if grad_norm is not None:
            self._norms.append(float(grad_norm))

    def calculate(self) -> dict[str, float]:
        """Return grad_norm and grad_norm_max."""
        if not self._norms:
            return {}
        return {"grad_norm": sum(self._norms) / len(self._norms), "grad_norm_max": max(self._norms)}
