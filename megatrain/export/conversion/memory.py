"""How much memory this process holds that is not a mapped file, and that it gives back."""

import ctypes
import sys
import threading
from typing import Self

import psutil

_M_MMAP_THRESHOLD = -3
SAMPLE_S = 0.02
"""Between two looks at the memory, which cost about 30 microseconds each."""


def anonymous_memory() -> int:
    """Return anonymous resident bytes; where the system does not tell, all resident bytes."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


def give_back_freed_tensors() -> None:
    """Let glibc return every freed megabyte to the system at once.

    By default it learns from the first tensors that are freed to keep ones of up to 32 MB in its
    heap, which then grows by as much as a gigabyte, in some runs and not in others.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 1 << 20)


class PeakMemory:
    """The most anonymous memory that this process had since it was entered, looked at often."""

    def __init__(self) -> None:
        self._before, self._most = 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        """Begin to look."""
        self._before = self._most = anonymous_memory()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look a last time."""
        self._stop.set()
        self._thread.join()
        self._most = max(self._most, anonymous_memory())

    @property
    def growth(self) -> int:
        """Bytes more than at the beginning."""
        return self._most - self._before

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._most = max(self._most, anonymous_memory())
