"""A base checkpoint with an adapter added: streamed, shard by shard as the base has them.

No more than one tensor is in memory, and blocks of float32.  Embedding and head that are tied in
the base are written apart if one of them is adapted: PEFT adapts the one without the other, too.
"""

import copy
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.open import open_checkpoint
from megatrain.checkpoint.safetensors_file import TensorSpec, write_tensors
from megatrain.checkpoint.safetensors_folder import INDEX, SafetensorsFolder
from megatrain.errors import ExportError, MegatrainError
from megatrain.export.adapters.base import Base, copy_carried, open_base
from megatrain.export.adapters.delta import FLOATS, Deltas, merged
from megatrain.export.adapters.deltas_of import EMBEDDING, HEAD, deltas_of
from megatrain.export.adapters.low_rank import BLOCK_BYTES
from megatrain.export.adapters.peft_file import BASE_WEIGHT, PeftFile, read_peft
from megatrain.export.peft_adapter import CONFIG, WEIGHTS, same_bytes
from megatrain.export.resumable import (
    Journal,
    ResumableFolder,
    check_space,
    checksum,
    explained,
)

TIE = "tie_word_embeddings"
BLOCKS = {False: 4, True: 8}
"""In memory beside a tensor: weights, product and sum; of a quantised base what they come from."""


@dataclass(frozen=True)
class Merge:
    """What will be written, from what: headers were read, no values."""

    base: Base
    adapter: Path
    deltas: Deltas
    shards: Mapping[str, Mapping[str, TensorSpec]]
    """By file, and by tensor."""
    sources: Mapping[str, str]
    """Tensors that are made of one of another name: a head that the base does not store."""
    untied: bool
    """Head and embedding are tied by the base's config, and must not be by the result's."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(spec.num_bytes for specs in self.shards.values() for spec in specs.values())

    @property
    def largest_tensor(self) -> int:
        """Bytes of the largest tensor, which is what must fit into memory."""
        return max(spec.num_bytes for specs in self.shards.values() for spec in specs.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes that a process needs: the largest tensor, and what its blocks are computed in."""
        return self.largest_tensor + BLOCKS[self.base.is_quantized] * BLOCK_BYTES

    def value(self, name: str) -> Tensor:
        """Return a tensor as it will be written."""
        stored = self.sources.get(name, name)
        plain, spec, deltas = self.base.plain, self.base.spec(stored), self.deltas.of.get(name, [])
        if deltas or (self.base.is_dequantised(stored) and len(spec.shape) in (2, 3)):
            return merged(plain.slice(stored), spec.shape, spec.dtype, deltas)
        return plain[stored].to(spec.dtype)


def plan_merge(base: Path, adapter: Path) -> Merge:
    """Check everything that can be checked from headers, and return what is to do.

    Raises ExportError or CheckpointError if the two do not fit, or a file is missing or damaged.
    """
    file, opened = read_peft(adapter), open_base(base)
    source = opened.plain
    shapes, sources = source.shapes(), {}
    if HEAD not in shapes and _adapts_tied(file):
        sources[HEAD] = _embedding(shapes)
        shapes[HEAD] = shapes[sources[HEAD]]
    deltas = deltas_of(file, opened.config, shapes)
    for name in deltas.of:
        if source.dtype(sources.get(name, name)) not in FLOATS:
            raise ExportError(
                f"nothing can be added to {name}, which is {source.dtype(name)}",
                hint="dequantise the base first",
            )
    _check_carried(file, source)
    shards: dict[str, dict[str, TensorSpec]] = {}
    for name in source:
        shard = shards.setdefault(opened.file_of(name), {})
        shard[name] = opened.spec(name)
        if sources.get(HEAD) == name:
            shard[HEAD] = shard[name]
    untied = _adapts_tied(file) and not _says_untied(opened.config)
    return Merge(opened, adapter, deltas, shards, sources, untied or bool(sources))


def merge(
    plan: Merge,
    out: Path,
    progress: Callable[[int], None],
    *,
    restart: bool = False,
    verify: bool = False,
) -> dict[str, Any]:
    """Write the merged checkpoint, or go on with it; return figures for a report.

    With `verify` it is read back before it gets its name; what fails is thrown away.

    Raises ExportError, and leaves no folder at `out`, if anything fails or something is at `out`
    already; what is whole is kept for the next time.
    """
    check_is_new(out)
    folder = ResumableFolder(out, _identity(plan), may_replace=_is_empty, restart=restart)
    # What an earlier run left is gone on with, or makes room.
    check_space(out, plan.num_bytes - _bytes_in(folder.folder))
    with explained(folder.folder), folder:
        journal = Journal(folder.folder)
        kept = len(journal.done)
        for name, specs in plan.shards.items():
            if name in journal.done:
                progress(sum(spec.num_bytes for spec in specs.values()))
            journal.write(name, functools.partial(_write, specs, plan, progress))
        _write_rest(folder.folder, plan)
        verified = _verified(plan, folder.folder, progress) if verify else {}
        folder.finish(journal.done)
    return {
        "tensors": sum(map(len, plan.shards.values())),
        "tensors_changed": len(plan.deltas.of),
        "files": len(plan.shards),
        "files_kept_from_before": kept,
        "untied": plan.untied,
        "dequantised": plan.base.is_quantized,
        **verified,
    }


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _verified(plan: Merge, folder: Path, progress: Callable[[int], None]) -> dict[str, str]:
    """Return what a report says of a result that is right; one that is wrong is removed."""
    try:
        return {"verified": f"{verify_merge(plan, folder, progress)} tensors, byte for byte"}
    except MegatrainError:
        shutil.rmtree(folder)
        raise


def check_is_new(out: Path) -> None:
    """Raise ExportError if something is at `out`: it may be the only copy of another model."""
    if os.path.lexists(out) and not (out.is_dir() and _is_empty(out)):
        raise ExportError(
            f"a merge is written to a new folder, and something is there already: {out}",
            hint="remove it, or choose another folder",
        )


def _is_empty(directory: Path) -> bool:
    return not any(directory.iterdir())


def verify_merge(plan: Merge, out: Path, progress: Callable[[int], None]) -> int:
    """Read the result back and compute it again; return how many tensors were compared.

    Raises ExportError, naming tensors, if a byte differs.
    """
    written = open_checkpoint(out)
    names = [name for specs in plan.shards.values() for name in specs]
    wrong = sorted(set(names) ^ set(written))
    for name in names:
        if name in written:
            value = plan.value(name)
            if not same_bytes(value, written[name]):
                wrong.append(name)
            progress(value.numel() * value.element_size())
    if wrong:
        raise ExportError(
            f"{len(wrong)} tensor(s) are not what the merge gives: {', '.join(wrong[:5])}"
        )
    return len(names)


def _write(
    specs: Mapping[str, TensorSpec], plan: Merge, progress: Callable[[int], None], path: Path
) -> tuple[str, dict[str, Any]]:
    def value(name: str) -> Tensor:
        tensor = plan.value(name)
        progress(specs[name].num_bytes)
        return tensor

    return write_tensors(path, specs, value), {}


def _write_rest(folder: Path, plan: Merge) -> None:
    """Copy configuration and tokenizer, write the index: with the head, where it is new."""
    base, config = plan.base.folder, copy.deepcopy(plan.base.config)
    copy_carried(base, folder)
    if plan.untied:
        config[TIE] = False
        if TIE in config.get("text_config", {}):
            config["text_config"][TIE] = False
    if plan.untied or plan.base.is_quantized:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if (base / INDEX).is_file():
        weight_map = {name: file for file, specs in plan.shards.items() for name in specs}
        index = json.loads((base / INDEX).read_text())
        index["weight_map"] = dict(sorted(weight_map.items()))
        index["metadata"] = (index.get("metadata") or {}) | {"total_size": plan.num_bytes}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _identity(plan: Merge) -> dict[str, Any]:
    """Return what decides the bytes: the base by size and time, the adapter by content."""
    stats = {name: (plan.base.folder / name).stat() for name in plan.shards}
    return {
        "base": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "adapter": {name: checksum(plan.adapter / name) for name in (CONFIG, WEIGHTS)},
    }


def _adapts_tied(file: PeftFile) -> bool:
    names = [f"{layer.path}.weight" for layer in file.layers]
    return any(name == HEAD or name.endswith(EMBEDDING) for name in names)


def _says_untied(config: Mapping[str, Any]) -> bool:
    """Tell whether a config says so itself: a default is its family's, and may be either."""
    text = config.get("text_config") or {}
    return config.get(TIE, text.get(TIE)) is False


def _embedding(shapes: Mapping[str, tuple[int, ...]]) -> str:
    found = [name for name in shapes if name.endswith(EMBEDDING)]
    if len(found) != 1:
        raise ExportError(f"cannot tell which tensor the head is tied to: {found}")
    return found[0]


def _check_carried(file: PeftFile, source: SafetensorsFolder) -> None:
    """Refuse an adapter whose file brings another embedding than the base has."""
    for key, tensor in file.carried.items():
        name = key.removesuffix(BASE_WEIGHT) + ".weight"
        name = _embedding(source.shapes()) if name == HEAD and name not in source else name
        base = source[name]
        if base.shape != tensor.shape or not torch.equal(base.to(tensor.dtype), tensor):
            raise ExportError(
                f"the adapter's file holds another {name} than the base",
                hint="the base was resized or trained where the adapter was made",
            )
