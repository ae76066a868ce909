"""Bring tensors that are spread over ranks to rank 0, whole and under Hugging Face's names.

Memory beyond what a rank holds: one batch of whole tensors.  No pickle: names and shapes travel as
JSON, values as raw bytes, over Gloo.
"""

import json
import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.errors import ExportError
from megatrain.model.tensor_slice import TensorSlice, over_tp
from megatrain.parallel.groups import Groups

BATCH_BYTES = 1 << 30
"""Whole tensors that are put together at a time."""


def gather(slices: Iterable[TensorSlice], groups: Groups) -> dict[str, Tensor] | None:
    """Return every tensor by name, sorted, on rank 0's CPU; None elsewhere.  Collective."""
    result: dict[str, Tensor] = {}
    for batch in stream(slices, groups):
        twice = result.keys() & batch.keys()
        if twice:
            raise ExportError(f"two ranks both own {sorted(twice)[:5]}")
        result.update(batch)
    return dict(sorted(result.items())) if groups.rank == 0 else None


def stream(
    slices: Iterable[TensorSlice], groups: Groups, *, batch_bytes: int = BATCH_BYTES
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of whole tensors on rank 0's CPU, nothing elsewhere.

    Collective over all ranks, each of which must run it to its end.
    """
    mine = _own_batches(slices, groups, batch_bytes)
    if groups.rank == 0:
        yield from _rounds(mine, groups)
        return
    for batch in mine:
        _send(batch, groups)
    _send(None, groups)


def _rounds(mine: Iterator[dict[str, Tensor]], groups: Groups) -> Iterator[dict[str, Tensor]]:
    """Yield one batch of each rank in turn, until all have said that they are done.

    In turn, since a rank that waits to be heard would be missing in the next collective of a group
    that it shares with rank 0.
    """
    active, done = list(range(1, groups.mesh.world_size)), False
    while active or not done:
        batch = None if done else next(mine, None)
        done = batch is None
        if batch:
            yield batch
        for rank in list(active):
            theirs = _receive(rank, groups)
            if theirs is None:
                active.remove(rank)
            elif theirs:
                yield theirs


def _own_batches(
    slices: Iterable[TensorSlice], groups: Groups, batch_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Yield whole tensors that this rank speaks for, maybe none.  Collective over (expert) TP."""
    for batch in _batches(slices, batch_bytes):
        owned: dict[str, Tensor] = {}
        for is_expert, dtype in sorted({(s.is_expert, s.value.dtype) for s in batch}, key=str):
            members = [s for s in batch if (s.is_expert, s.value.dtype) == (is_expert, dtype)]
            tp = groups.expert_tp if is_expert else groups.tp
            data = groups.expert_data if is_expert else groups.data
            wholes = over_tp(members, tp)
            if tp.rank() == 0 and data.rank() == 0:
                owned |= {s.name: w.cpu() for s, w in zip(members, wholes, strict=True)}
        yield owned


def _batches(slices: Iterable[TensorSlice], batch_bytes: int) -> Iterator[list[TensorSlice]]:
    batch: list[TensorSlice] = []
    size = 0
    for each in slices:
        num_bytes = math.prod(each.full_shape) * each.value.element_size()
        if batch and size + num_bytes > batch_bytes:
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += num_bytes
    if batch:
        yield batch


def _send(batch: dict[str, Tensor] | None, groups: Groups) -> None:
    """Send a batch to rank 0, or None: there are no more."""
    if batch is None:
        dist.send(torch.zeros(2, dtype=torch.int64), 0, group=groups.control)
        return
    header = [
        [name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in batch.items()
    ]
    meta = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in batch.values()]
    body = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    dist.send(torch.tensor([meta.numel(), body.numel()]), 0, group=groups.control)
    dist.send(meta, 0, group=groups.control)
    if body.numel():
        dist.send(body, 0, group=groups.control)


def _receive(rank: int, groups: Groups) -> dict[str, Tensor] | None:
    sizes = torch.empty(2, dtype=torch.int64)
    dist.recv(sizes, rank, group=groups.control)
    num_meta, num_body = sizes.tolist()
    if not num_meta:
        return None
    meta, body = (torch.empty(n, dtype=torch.uint8) for n in (num_meta, num_body))
    dist.recv(meta, rank, group=groups.control)
    if num_body:
        dist.recv(body, rank, group=groups.control)
    return _unpack(meta, body)


def _unpack(meta: Tensor, body: Tensor) -> dict[str, Tensor]:
    result, start = {}, 0
    for name, shape, dtype_name in json.loads(bytes(meta.numpy()).decode()):
        dtype = getattr(torch, dtype_name)
        size = math.prod(shape) * dtype.itemsize
        result[name] = body[start : start + size].clone().view(dtype).view(shape)
        start += size
    return result
