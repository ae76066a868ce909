"""Save what was trained: an adapter as a PEFT directory, a whole model as a checkpoint folder.

Rank 0 writes; if it fails, every rank raises.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatrain.checkpoint.names import ParameterTable
from megatrain.errors import ExportError
from megatrain.export.checkpoint import write_checkpoint
from megatrain.export.gather import gather, stream
from megatrain.export.peft_adapter import write_adapter
from megatrain.model.adapter import Adapter
from megatrain.model.base import base_slices
from megatrain.parallel.groups import Groups


def save_adapter(
    directory: Path, adapter: Adapter, groups: Groups, *, base_model: str, folder: Path
) -> None:
    """Write the adapter as a verified PEFT directory.  Collective over all ranks.

    `base_model` is the name that goes into adapter_config.json, `folder` the checkpoint itself.
    Raises ExportError on every rank if rank 0 could not write or verify the file.
    """
    tensors = gather(adapter.slices(), groups)

    def write() -> None:
        assert tensors is not None
        hf_config = json.loads((folder / "config.json").read_text())
        write_adapter(
            directory,
            spec=adapter.spec,
            tensors=tensors,
            base_model=base_model,
            hf_config=hf_config,
        )

    _on_rank_0(write, groups, directory)


def save_checkpoint(
    directory: Path, table: ParameterTable, groups: Groups, *, folder: Path
) -> None:
    """Write the whole model as a Hugging Face checkpoint, sharded and verified.  Collective.

    Configuration and tokenizer are carried along from `folder`.  Raises ExportError on every rank.
    """
    batches = stream(base_slices(table), groups)
    if groups.rank != 0:
        for _ in batches:
            pass

    def write() -> None:
        try:
            write_checkpoint(directory, batches, source=folder)
        finally:
            for _ in batches:  # the other ranks must get rid of what they have to send
                pass

    _on_rank_0(write, groups, directory)


def _on_rank_0(write: Callable[[], None], groups: Groups, directory: Path) -> None:
    failure, cause = "", None
    if groups.rank == 0:
        try:
            write()
        except Exception as error:  # noqa: BLE001 - the other ranks wait to hear of any failure
            failure, cause = f"{type(error).__name__}: {error}", error
    failure = _broadcast_text(failure, groups)
    if failure:
        raise ExportError(f"nothing was saved to {directory}: {failure}") from cause


def _broadcast_text(text: str, groups: Groups) -> str:
    """Return rank 0's text on every rank.  Collective."""
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    size = torch.tensor([data.numel()])
    dist.broadcast(size, 0, group=groups.control)
    if groups.rank != 0:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0, group=groups.control)
    return bytes(data.numpy()).decode().rstrip("\0")
