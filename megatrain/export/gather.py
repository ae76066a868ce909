"""Bring an adapter that is spread over ranks to rank 0, whole and under Hugging Face's names.

Memory beyond the adapter itself: one more copy of what a rank holds, in full rows and columns.
No pickle: names and shapes travel as JSON, values as raw bytes, over Gloo.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.errors import ExportError
from megatrain.export.peft_adapter import write_adapter
from megatrain.model.adapter import Adapter, Factor
from megatrain.parallel.groups import Groups


def gather_adapter(adapter: Adapter, groups: Groups) -> dict[str, Tensor] | None:
    """Return every factor by name on rank 0 (on the CPU), None elsewhere.  Collective.

    Names are `<Hugging Face module>.lora_A` and `.lora_B`; dtypes are those of training.
    """
    owned: dict[str, Tensor] = {}
    for is_expert in (False, True):
        factors = [f for f in adapter.factors() if f.is_expert == is_expert]
        whole = _over_tp(factors, groups.expert_tp if is_expert else groups.tp)
        if _is_owner(groups, is_expert=is_expert):
            owned.update(whole)
    return _to_rank_0(owned, groups)


def _is_owner(groups: Groups, *, is_expert: bool) -> bool:
    """Tell whether this rank speaks for all that hold the same factors."""
    tp, data = (groups.expert_tp, groups.expert_data) if is_expert else (groups.tp, groups.data)
    return bool(tp.rank() == 0 and data.rank() == 0)


def _over_tp(factors: Sequence[Factor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return whole factors on the CPU.  Collective over `group`.

    Each rank writes its own rows or columns into zeros; the sum over ranks is exact.
    """
    if not factors:
        return {}
    sizes = [math.prod(factor.full_shape) for factor in factors]
    first = factors[0].value
    flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    result = {}
    for factor, piece in zip(factors, flat.split(sizes), strict=True):
        whole = piece.view(factor.full_shape)
        if factor.dim is None or factor.index is None:
            if group.rank() == 0:
                whole.copy_(factor.value)
        else:
            whole.index_copy_(factor.dim, factor.index.to(whole.device), factor.value)
        result[factor.name] = whole
    if group.size() > 1:
        dist.all_reduce(flat, group=group)
    return {name: whole.cpu() for name, whole in result.items()}


def _to_rank_0(owned: dict[str, Tensor], groups: Groups) -> dict[str, Tensor] | None:
    """Collect disjoint sets of named tensors on rank 0.  Collective over all ranks."""
    header = [
        [name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in owned.items()
    ]
    meta = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    body = (
        torch.cat([_bytes(t) for t in owned.values()])
        if owned
        else torch.empty(0, dtype=torch.uint8)
    )
    world = groups.mesh.world_size
    sizes = torch.zeros(world, 2, dtype=torch.int64)
    sizes[groups.rank] = torch.tensor([meta.numel(), body.numel()])
    dist.all_reduce(sizes, group=groups.control)
    if groups.rank != 0:
        if owned:
            dist.send(meta, 0, group=groups.control)
            dist.send(body, 0, group=groups.control)
        return None
    result = dict(owned)
    for rank in range(1, world):
        num_meta, num_body = sizes[rank].tolist()
        if num_body:
            meta, body = (torch.empty(n, dtype=torch.uint8) for n in (num_meta, num_body))
            dist.recv(meta, rank, group=groups.control)
            dist.recv(body, rank, group=groups.control)
            _merge(result, meta, body)
    return dict(sorted(result.items()))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _merge(result: dict[str, Tensor], meta: Tensor, body: Tensor) -> None:
    start = 0
    for name, shape, dtype_name in json.loads(bytes(meta.numpy()).decode()):
        if name in result:
            raise ExportError(f"two ranks both own {name!r}")
        dtype = getattr(torch, dtype_name)
        size = math.prod(shape) * dtype.itemsize
        result[name] = body[start : start + size].clone().view(dtype).view(shape)
        start += size


def save_adapter(
    directory: Path, adapter: Adapter, groups: Groups, *, base_model: str, folder: Path
) -> None:
    """Write the adapter as a verified PEFT directory.  Collective over all ranks.

    `base_model` is the name that goes into adapter_config.json, `folder` the checkpoint itself.
    Raises ExportError on every rank if rank 0 could not write or verify the file.
    """
    tensors = gather_adapter(adapter, groups)
    failure = ""
    if tensors is not None:
        try:
            hf_config = json.loads((folder / "config.json").read_text())
            write_adapter(
                directory,
                spec=adapter.spec,
                tensors=tensors,
                base_model=base_model,
                hf_config=hf_config,
            )
        except (ExportError, OSError, ValueError) as error:
            failure = str(error) or type(error).__name__
    failure = _broadcast_text(failure, groups)
    if failure:
        raise ExportError(f"the adapter was not saved to {directory}: {failure}")


def _broadcast_text(text: str, groups: Groups) -> str:
    """Return rank 0's text on every rank.  Collective."""
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    size = torch.tensor([data.numel()])
    dist.broadcast(size, 0, group=groups.control)
    if groups.rank != 0:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0, group=groups.control)
    return bytes(data.numpy()).decode().rstrip("\0")
