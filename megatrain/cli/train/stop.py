"""A request to stop, by signal: the run saves after the step in hand, and ends.

Exit status: 143 after SIGTERM, 130 after SIGINT (128 + the signal, as shells have it), so that a
scheduler can tell a saved, unfinished run from a finished one, which is 0.
"""

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequest:
    """Holds the first signal that came while it was entered; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal; 0 if none came."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
