"""What is reported about training: the base class."""

from abc import ABC, abstractmethod
from typing import Any


class Metric(ABC):
    """Numbers gathered over calls, until `reset`.

    What comes in is of the global batch, the same on every rank, so nothing is communicated.
    """

    @abstractmethod
    def accumulate(self, *args: Any, **values: Any) -> None:
        """Count one call: its rows, its StepOutput, and what the metric takes by name."""

    @abstractmethod
    def calculate(self) -> dict[str, float]:
        """Return what there is to report, by name; nothing for what was never counted."""

    @abstractmethod
    def reset(self) -> None:
        """Start anew."""
