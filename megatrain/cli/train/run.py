"""What one run consists of, on this rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatrain.cli.train.folder import RunFolder
from megatrain.cli.train.history import History, Line
from megatrain.cli.train.progress import Progress
from megatrain.cli.train.ranks import Ranks
from megatrain.cli.train.reference import LossInputs
from megatrain.cli.train.stop import StopRequest
from megatrain.cli.train.trackers import Tracker
from megatrain.config.run import RunConfig

Batch = Sequence[Mapping[str, Any]]


class Clock:
    """Seconds of steps since they were last told, and how many of them went by waiting for data."""

    def __init__(self) -> None:
        self._seconds = self._waited = 0.0

    def add(self, seconds: float, *, waited: float) -> None:
        """Count one step."""
        self._seconds += seconds
        self._waited += waited

    def take(self, tokens: float) -> Line:
        """Return tokens_per_second, seconds and data_wait (a share), and start anew."""
        line = {
            "tokens_per_second": tokens / self._seconds,
            "seconds": self._seconds,
            "data_wait": self._waited / self._seconds,
        }
        self._seconds = self._waited = 0.0
        return line


@dataclass(kw_only=True)
class Run:
    """Everything that the loop works with."""

    config: RunConfig
    folder: RunFolder
    ranks: Ranks
    model: Any
    loader: Any
    """Training batches; knows how many rows it has handed out."""
    eval_loader: Any | None
    loss_inputs: LossInputs
    history: History
    progress: Progress
    trackers: Sequence[Tracker]
    steps: int
    """Optimizer steps of the whole run."""
    done: int = 0
    """Optimizer steps so far."""
    clock: Clock = field(default_factory=Clock)
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def batches_per_epoch(self) -> int | None:
        """Calls of forward_backward in one pass over the data; None for a stream."""
        return None if self.config.data.streaming else len(self.loader)

    def stop_signal(self) -> int:
        """Return the signal that any rank got; 0 if none did.  Collective."""
        return self.ranks.largest(self.stop.signal)
