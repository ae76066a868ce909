"""What the passes before a step have trained.

A pass and the step behind it are on the ranks at once, and their results may be taken in either way
round: so a pass is told where it counts when it begins.
"""

import asyncio


class Tally:
    """Sums over the passes before one step."""

    def __init__(self) -> None:
        self.tokens = 0
        self.loss = 0.0
        """Sum of the losses."""
        self.seconds = 0.0
        self._num_open = 0
        self._changed = asyncio.Event()

    def begin(self) -> None:
        """Expect one more pass."""
        self._num_open += 1

    def end(self, tokens: int, loss: float, seconds: float) -> None:
        """Count a pass that was begun; zeros for one that has failed."""
        self.tokens += tokens
        self.loss += loss
        self.seconds += seconds
        self._num_open -= 1
        self._changed.set()

    async def settled(self) -> None:
        """Wait until all passes that were begun have ended."""
        while self._num_open:
            self._changed.clear()
            await self._changed.wait()
