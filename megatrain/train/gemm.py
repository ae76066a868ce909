"""How fast a device multiplies matrices: what MFU is measured against.  Plain torch alone."""

import time

import torch

REPEATS = 5


def gemm_rate(device: torch.device, dtype: torch.dtype, *, size: int) -> float:
    """Return the FLOPs per second of the fastest of a few products of square matrices."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    left, right = left.to(device, dtype), right.to(device, dtype)
    _seconds(left, right)
    return 2.0 * size**3 / min(_seconds(left, right) for _ in range(REPEATS))


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the seconds of one product; reading a number of it waits for the device."""
    start = time.perf_counter()
    float((left @ right)[0, 0])
    return time.perf_counter() - start
