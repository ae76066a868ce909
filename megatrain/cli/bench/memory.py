"""How long a stretch of work took, and the most memory that it held, on a CPU or a GPU."""

import ctypes
import gc
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch

SAMPLE_EVERY_S = 0.01
STATUS = Path("/proc/self/status")


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`, then `peak.bytes`.

    On a CPU that is the process's anonymous memory (RssAnon), weights included but not the files
    that are mapped; `peak.resident_bytes` has those too.  On a GPU, allocated device memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = self.resident_bytes = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        settle()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            self.resident_bytes = torch.cuda.max_memory_reserved(self.device)

    def _sample(self) -> None:
        while not self._done.is_set():
            anonymous, resident = resident_memory()
            self.bytes = max(self.bytes, anonymous)
            self.resident_bytes = max(self.resident_bytes, resident)
            self._done.wait(SAMPLE_EVERY_S)


class Stopwatch:
    """`with Stopwatch(device) as watch: ...`, then `watch.seconds`, the device's work included.

    `watch.cpu_seconds` is the processors' time, which other work on the machine changes less.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.cpu_seconds = device, 0.0, 0.0

    def __enter__(self) -> Self:
        self._wait()
        self._cpu_start = time.process_time()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._start
        self.cpu_seconds = time.process_time() - self._cpu_start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measurement(watch: Stopwatch, peak: PeakMemory) -> dict[str, float]:
    """Return what both found, for an answer."""
    return {
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu_seconds,
        "bytes": peak.bytes,
        "resident": peak.resident_bytes,
    }


def resident_memory() -> tuple[int, int]:
    """Return this process's anonymous and whole resident memory in bytes."""
    if not STATUS.exists():
        resident = int(psutil.Process().memory_info().rss)
        return resident, resident
    lines = STATUS.read_text().splitlines()
    kib = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return (
        int(kib["RssAnon"].split()[0]) * 1024,
        int(kib["VmRSS"].split()[0]) * 1024,
    )


def settle() -> None:
    """Give back what earlier work left behind, so that it does not count for the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
