"""Tokens per second, and how much of the devices' arithmetic they are (MFU)."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatrain.config.estimate.work import Work
from megatrain.errors import ConfigError
from megatrain.rl.metric import Metric


class ThroughputMetric(Metric):
    """Speed of training calls; with `work` and `peak_flops` also the model FLOPs utilisation.

    MFU counts what the model needs: with frozen weights 4 FLOPs a token and active parameter,
    with all trained 6, and attention; not what recomputation does again.
    """

    def __init__(
        self,
        *,
        num_devices: int = 1,
        work: Work | None = None,
        peak_flops: float | None = None,
        is_frozen: bool = True,
    ) -> None:
        """`peak_flops`: of one device, a second.  `is_frozen`: only adapters are trained."""
        if (work is None) != (peak_flops is None):
            raise ConfigError("MFU needs both work and peak_flops, or give neither")
        if num_devices < 1 or (peak_flops is not None and peak_flops <= 0):
            raise ConfigError(
                "num_devices and peak_flops must be positive: "
                f"num_devices={num_devices}, peak_flops={peak_flops}"
            )
        self.num_devices, self.work, self.peak_flops = num_devices, work, peak_flops
        self.is_frozen = is_frozen
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._tokens, self._flops, self._seconds = 0, 0.0, 0.0

    def accumulate(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Any = None, *, seconds: float
    ) -> None:
        """Add one call over these rows, with `length`, `lengths` or `input_ids`."""
        lengths = [length for row in inputs for length in _lengths(row)]
        self._tokens += sum(lengths)
        self._seconds += seconds
        if self.work is not None:
            self._flops += self.work.train_flops(lengths, is_frozen=self.is_frozen)

    def calculate(self) -> dict[str, float]:
        """Return tokens_per_second, of all devices and of one, and mfu in [0, 1] if asked for."""
        if not self._seconds:
            return {}
        speed = self._tokens / self._seconds
        result = {
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / self.num_devices,
        }
        if self.peak_flops is not None:
            result["mfu"] = self._flops / (self._seconds * self.num_devices * self.peak_flops)
        return result


def _lengths(row: Mapping[str, Any]) -> list[int]:
    """Return the lengths of a row's sequences; a packed row has several."""
    if "lengths" in row:
        return [int(length) for length in row["lengths"]]
    return [int(row["length"]) if "length" in row else len(row["input_ids"])]
