"""How beats change: tokens in all and by second, and for how long a rank has been silent.

A thread looks at the driver's last beats twice a second, whether anybody scrapes or not.  No torch.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from megatrain.bus.beat import Beat

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""Seconds between looks; beats come about as often."""
WINDOW_S = 60.0
"""Seconds over which tokens/s is a mean."""
STEP_S = 5.0
"""Seconds of one value of the history."""
KEPT_S = 120.0
"""Seconds that the history reaches back."""


class BeatLog:
    """What follows from the beats of one driver's ranks."""

    def __init__(self, read: Callable[[], Sequence[Beat]]) -> None:
        """`read` returns the last beats of all ranks."""
        self._read, self._lock = read, threading.Lock()
        self._counts: dict[int, tuple[int, float]] = {}
        """By rank: its last count of beats, and when that was new."""
        self._pid, self._last = 0, 0
        """Rank 0's process, and its tokens."""
        self.tokens = 0
        """In passes since this driver is there; a pass that is done again counts again."""
        self._samples: deque[tuple[float, int]] = deque(maxlen=int(KEPT_S / LOOK_S) + 1)
        self._stopped = threading.Event()

    def start(self) -> None:
        """Look from now on."""
        threading.Thread(target=self._run, name="bus-telemetry", daemon=True).start()

    def close(self) -> None:
        """Look no longer."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_S):
            try:
                self.note(self._read(), time.monotonic())
            except Exception:
                logger.exception("the beats could not be read")

    def note(self, beats: Sequence[Beat], now: float) -> None:
        """Take in what the ranks said last."""
        with self._lock:
            for beat in beats:
                if self._counts.get(beat.rank, (-1, 0.0))[0] != beat.count:
                    self._counts[beat.rank] = beat.count, now
            if beats:
                self._count(beats)
            self._samples.append((now, self.tokens))

    def _count(self, beats: Sequence[Beat]) -> None:
        # Every rank counts the tokens of the whole batch, some a moment later than others.
        pid, tokens = beats[0].pid, max(beat.tokens for beat in beats)
        if not self._pid:
            self._last = tokens  # ranks that somebody else drove before
        elif pid != self._pid:
            self._last = 0  # they have started anew
        self.tokens += max(0, tokens - self._last)
        self._pid, self._last = pid, tokens

    def silence(self, rank: int, now: float) -> float:
        """Return the seconds since a rank's last beat."""
        return max(0.0, now - self._counts.get(rank, (0, now))[1])

    def tokens_per_second(self) -> float:
        """Return the mean over the last minute."""
        with self._lock:
            samples = list(self._samples)
        return _rate(samples, WINDOW_S)

    def history(self) -> list[float]:
        """Return tokens/s in steps of a few seconds, the oldest first."""
        with self._lock:
            samples = list(self._samples)
        steps: list[float] = []
        while len(samples) > 1 and samples[-1][0] - samples[0][0] >= STEP_S:
            steps.append(_rate(samples, STEP_S))
            end = samples[-1][0] - STEP_S
            samples = [each for each in samples if each[0] <= end]
        return steps[::-1]


def _rate(samples: Sequence[tuple[float, int]], window_s: float) -> float:
    """Return the growth by second in the last so many seconds of samples."""
    if len(samples) < 2:
        return 0.0
    end, total = samples[-1]
    begin, before = next(each for each in samples if each[0] >= end - window_s)
    return (total - before) / (end - begin) if end > begin else 0.0
