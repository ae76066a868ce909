"""From a Hugging Face checkpoint to a Megatron distributed checkpoint (torch_dist), streamed.

Each rank of the wanted layout is played in turn, without values; then one parameter after the other
is read, slice by slice, and written.  Every process makes the same plan and does its share of it.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.load import check_claimed, load_parameter
from megatrain.checkpoint.safetensors_file import write_tensors
from megatrain.checkpoint.torch_dist_write import Blob, Piece, cut, write_metadata, write_pieces
from megatrain.export.adapters.base import Base, kind_of, open_base
from megatrain.export.conversion.carried import (
    CONVERSION,
    FOLDER,
    LEFT_OUT,
    Written,
    cast_originals,
    copy_files,
    originals_of,
    set_dtype,
    write_originals,
)
from megatrain.export.resumable import Journal
from megatrain.model.outline import Outline, StoredParameter, outline
from megatrain.model.provider import make_bridge
from megatrain.parallel.layout import DeviceMesh

ITERATION = "iter_0000001"
TRACKER = "latest_checkpointed_iteration.txt"
COMMON = {"checkpoint_version": 3.0, "iteration": 1, "content_metadata": {}}
"""What Megatron and Bridge look for beside tensors."""


@dataclass(frozen=True, slots=True)
class ToMegatron:
    """One conversion; every process gets the same."""

    source: Path
    mesh: DeviceMesh
    cast: torch.dtype | None
    """Of all floating point tensors; None keeps what is stored."""
    file_bytes: int
    """After so many a new .distcp file is begun."""
    allow_pickle: bool = False
    """Read pytorch_model*.bin, if there is no safetensors file, with torch's safe unpickler."""

    def open(self) -> Base:
        """Return the source's tensors, dequantised while they are read."""
        return open_base(self.source, allow_pickle=self.allow_pickle)

    def run(self, folder: Path, share: tuple[int, int], progress: Callable[[int], None]) -> Written:
        """Write this process's share (index, number of processes) of the files."""
        checkpoint = self.open()
        shapes, left_out = checkpoint.stored.shapes(), set(checkpoint.plain)
        writer = _Writer(self, checkpoint, Journal(folder, share[0]), progress)
        files: list[str] = []
        for rank in range(self.mesh.world_size):
            with outline(self.source, self.mesh, rank, shapes) as part:
                check_claimed(part.table, checkpoint.plain)
                for stored in part.stored:
                    left_out.difference_update(part.table.hf_names(stored.parameter))
                for index, unit in enumerate(self._units(part, checkpoint)):
                    name = f"{ITERATION}/__{rank}_{index}.distcp"
                    if len(files) % share[1] == share[0]:
                        writer.write(name, part, unit, _extras(part, rank) if index == 0 else [])
                    files.append(name)
        if left_out:
            if len(files) % share[1] == share[0]:
                writer.write_beside(sorted(left_out))
            files.append(f"{FOLDER}/{LEFT_OUT}")
        return Written(tuple(files), tuple(sorted(left_out)))

    def check(self) -> None:
        """Raise what the conversion would raise for this layout and model, before it begins."""
        checkpoint = self.open()
        shapes = checkpoint.stored.shapes()
        for rank in range(self.mesh.world_size):
            with outline(self.source, self.mesh, rank, shapes) as part:
                check_claimed(part.table, checkpoint.plain)

    def warm_up(self) -> None:
        """Have everything imported that the work needs, so that its memory is its own."""
        with outline(self.source, self.mesh, 0, self.open().stored.shapes()):
            pass

    def _units(self, part: Outline, checkpoint: Base) -> Iterator[list[StoredParameter]]:
        """Cut a rank's parameters into files; a rank without any still has one."""
        unit: list[StoredParameter] = []
        size, count = 0, 0
        for stored in part.stored:
            if not _is_written(stored):
                continue
            parameter = stored.parameter.parameter
            num_bytes = parameter.numel() * self.dtype(part, stored, checkpoint).itemsize
            if unit and size + num_bytes > self.file_bytes:
                yield unit
                unit, size, count = [], 0, count + 1
            unit.append(stored)
            size += num_bytes
        if unit or not count:
            yield unit

    def dtype(self, part: Outline, stored: StoredParameter, checkpoint: Base) -> torch.dtype:
        """Return the dtype in which a parameter is written: the one that holds all its parts.

        Those of every layer: Megatron's checkpoint has one tensor of all layers, and one dtype.
        """
        names = [n for n in part.table.hf_names(stored.parameter) if n in checkpoint.plain]
        dtypes = [checkpoint.dtypes[kind_of(name)] for name in names] or [torch.float32]
        dtype = reduce(torch.promote_types, dtypes)
        return self.cast if self.cast is not None and dtype.is_floating_point else dtype


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes one process's files."""

    job: ToMegatron
    checkpoint: Base
    journal: Journal
    progress: Callable[[int], None]

    def write(
        self, name: str, part: Outline, unit: list[StoredParameter], extras: list[Blob]
    ) -> None:
        """Write one file, unless it is whole already."""

        def make(path: Path) -> tuple[str, Mapping[str, Any]]:
            digest, records = write_pieces(path, itertools.chain(extras, self._pieces(part, unit)))
            return digest, {"pieces": records}

        self.journal.write(name, make)

    def write_beside(self, names: list[str]) -> None:
        """Write what Megatron has no place for, as it is."""
        specs = {name: self.checkpoint.spec(name) for name in names}

        def value(name: str) -> Tensor:
            self.progress(specs[name].num_bytes)
            return self.checkpoint.plain[name].to(specs[name].dtype)

        def make(path: Path) -> tuple[str, Mapping[str, Any]]:
            return write_tensors(path, specs, value), {"pieces": []}

        self.journal.write(f"{FOLDER}/{LEFT_OUT}", make)

    def _pieces(self, part: Outline, unit: list[StoredParameter]) -> Iterator[Piece]:
        for stored in unit:
            dtype = self.job.dtype(part, stored, self.checkpoint)
            value = read_parameter(part, stored, self.checkpoint, dtype)
            yield from cut(stored.pieces(value))
            self.progress(value.numel() * value.element_size())


def read_parameter(
    part: Outline, stored: StoredParameter, checkpoint: Base, dtype: torch.dtype
) -> Tensor:
    """Return a parameter's value on this rank, from the checkpoint's slices."""
    value = torch.empty(stored.parameter.parameter.shape, dtype=dtype)
    load_parameter(
        part.table, dataclasses.replace(stored.parameter, parameter=value), checkpoint.stored
    )
    return value


def _is_written(stored: StoredParameter) -> bool:
    """Tell whether this rank is the one that writes it, and not a replica."""
    meta = stored.parameter.parameter.detach()
    return any(True for _ in cut(stored.pieces(meta)))


def _extras(part: Outline, rank: int) -> list[Blob]:
    from megatron.core.dist_checkpointing.mapping import (  # noqa: PLC0415 - patched first
        is_main_replica,
    )

    found = [Blob(o.unique_key, [o.data]) for o in part.objects if is_main_replica(o.replica_id)]
    return [*found, Blob("common_state/shard_0_1", [COMMON])] if rank == 0 else found


def finish(folder: Path, job: ToMegatron) -> None:
    """Write what needs all files: `.metadata`, Bridge's configuration, what is carried along."""
    done = Journal(folder, trusted=True).done
    iteration = folder / ITERATION
    records = [
        (Path(name).name, record) for name, entry in done.items() for record in entry["pieces"]
    ]
    write_metadata(iteration, records)
    _write_run_config(iteration, job)
    (folder / TRACKER).write_text(str(int(re.sub(r"\D", "", ITERATION))))
    source, originals = job.open(), originals_of(job.open())
    copy_files(job.source, folder / FOLDER)
    if source.is_quantized:
        config = json.dumps(source.config, indent=2, sort_keys=True)
        (folder / FOLDER / "config.json").write_text(config + "\n")
    if job.cast is not None:
        originals = cast_originals(originals, job.cast)
        set_dtype(folder / FOLDER / "config.json", job.cast)
    write_originals(folder / FOLDER, originals)
    files = {name: {"size": e["size"], "xxh3": e["xxh3"]} for name, e in done.items()}
    (folder / FOLDER / CONVERSION).write_text(
        json.dumps({"layout": job.mesh.to_dict(), "files": files}, indent=0)
    )


def _write_run_config(iteration: Path, job: ToMegatron) -> None:
    """Write run_config.yaml, from which Megatron-Bridge makes the model."""
    from megatron.bridge.training.utils.config_utils import (  # noqa: PLC0415 - patched first
        _ConfigContainerBase,
    )

    provider = make_bridge(job.source).to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = job.mesh.tp
    provider.pipeline_model_parallel_size = job.mesh.pp
    provider.expert_model_parallel_size = job.mesh.ep
    provider.expert_tensor_parallel_size = job.mesh.etp
    # Bridge's own container imports its data loaders, and they a package that conversion needs not.
    kind = dataclasses.make_dataclass("RunConfig", [("model", Any)], bases=(_ConfigContainerBase,))
    kind(model=provider).to_yaml(str(iteration / "run_config.yaml"))
