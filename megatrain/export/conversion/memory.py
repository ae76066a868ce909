"""How much memory a conversion will need, and how much this process holds beside mapped files."""

import ctypes
import math
import sys
import threading
from collections.abc import Mapping
from typing import Self

import psutil

from megatrain.checkpoint.safetensors_file import TensorSpec

_M_MMAP_THRESHOLD = -3
SAMPLE_S = 0.02
"""Between two looks at the memory, which cost about 30 microseconds each."""

BESIDE_TENSORS = 8_000_000
"""Bytes: names, journals, and blocks of files whose checksums are formed."""
FUSED, DEQUANTISED = 3, 6
"""In layers' matrices: gate and up in one parameter with a copy of one half of it; what the float32
values of a quantised one are computed in."""


def needed_memory(specs: Mapping[str, TensorSpec], *, is_quantized: bool = False) -> int:
    """Return the bytes that an import or export of these tensors needs, in one process.

    That is the largest tensor, or the largest that Megatron makes of several.
    """
    largest = max(spec.num_bytes for spec in specs.values())
    matrices = [_matrix_bytes(spec) for name, spec in specs.items() if ".layers." in name]
    times = FUSED + DEQUANTISED * is_quantized
    return max(largest, times * max(matrices, default=0)) + BESIDE_TENSORS


def _matrix_bytes(spec: TensorSpec) -> int:
    """Return the bytes of a matrix, of one expert in a tensor of all of them."""
    return math.prod(spec.shape[-2:]) * spec.dtype.itemsize


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
