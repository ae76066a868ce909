"""What ranks do for test_memory_estimate."""

import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatrain.cli.bench.memory import PeakMemory, resident_memory
from tests.multiprocess.data import Batch
from tests.multiprocess.tasks import make_model

M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt."""


def parameter_counts(folder: Path, lora: dict[str, Any] | None) -> dict[str, int]:
    """Return entries of the base on this rank, and of an adapter's factors."""
    model = make_model(folder, lora or {})
    network = model._network
    adapter = network.adapters.get("default")
    trained = adapter.trained_parameters() if adapter is not None else []
    factors = sum(each.parameter.numel() for each in trained)
    held = {id(p): p.numel() for chunk in network.chunks for p in chunk.parameters()}
    return {"base": sum(held.values()) - factors, "factors": factors}


def saved_bytes(folder: Path, lora: dict[str, Any] | None, batch: Batch) -> int:
    """Return the bytes that autograd keeps for backward, each storage once, without parameters."""
    model = make_model(folder, lora or {})
    model.set_optimizer("AdamW", lr=1e-4)
    own = {p.untyped_storage().data_ptr() for c in model._network.chunks for p in c.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept.setdefault(place, tensor)  # held, so that no other tensor takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.forward_backward(inputs=batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak_growth(
    folder: Path, lora: dict[str, Any] | None, batches: Sequence[Batch], options: dict[str, Any]
) -> int:
    """Return bytes of anonymous memory that loading and training add at their peak.

    The C library is told to map every block of a MiB by itself: else it keeps what was freed, and
    a third more is resident than tensors hold.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    gc.collect()
    before, _ = resident_memory()
    with PeakMemory(torch.device("cpu")) as peak:
        model = make_model(folder, lora or {}, **options)
        model.set_optimizer("AdamW", lr=1e-4)
        for batch in batches:
            model.forward_backward(inputs=batch)
            model.clip_grad_and_step()
    return peak.bytes - before
