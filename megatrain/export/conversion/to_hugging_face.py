"""From a Megatron distributed checkpoint (torch_dist) to a Hugging Face checkpoint, streamed."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.safetensors_file import TensorSpec, write_tensors
from megatrain.checkpoint.safetensors_folder import INDEX, SafetensorsFolder
from megatrain.checkpoint.torch_dist_read import TorchDistFolder
from megatrain.errors import CheckpointError
from megatrain.export.conversion.carried import LEFT_OUT, Original, Written, copy_files, set_dtype
from megatrain.export.conversion.inverse import Inverse
from megatrain.export.resumable import Journal
from megatrain.model.outline import StoredParameter, outline
from megatrain.parallel.layout import DeviceMesh

SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ToHuggingFace:
    """One conversion; every process gets the same."""

    source: Path
    config: Path
    """Folder with config.json and tokenizer."""
    originals: Mapping[str, Original]
    """The tensors that the result has: names, shapes, dtypes and files."""
    keeps_dtypes: bool
    """Whether the originals' dtypes count, or those of the Megatron checkpoint."""
    cast: torch.dtype | None
    """Of all floating point tensors."""
    shard_bytes: int | None
    """None keeps the originals' files."""

    def run(self, folder: Path, share: tuple[int, int], progress: Callable[[int], None]) -> Written:
        """Write this process's share (index, number of processes) of the files."""
        journal = Journal(folder, share[0])
        with self.inverse() as inverse:
            specs, shards = self.specs(inverse), self.shards(inverse)
            for number, (file, names) in enumerate(shards.items()):
                if number % share[1] != share[0]:
                    continue

                def make(path: Path, names: list[str] = names) -> tuple[str, Mapping[str, Any]]:
                    def value(name: str) -> Tensor:
                        result = inverse.value(name).to(specs[name].dtype)
                        progress(specs[name].num_bytes)
                        return result

                    digest = write_tensors(path, {name: specs[name] for name in names}, value)
                    return digest, {"tensors": names}

                journal.write(file, make)
            return Written(tuple(shards), ())

    def check(self) -> None:
        """Raise CheckpointError if the model has tensors that are nowhere to be had."""
        with self.inverse() as inverse:
            lacking = inverse.left_out()
        if lacking:
            raise CheckpointError(
                f"{len(lacking)} tensor(s) of the model are not in {self.source}: "
                f"{', '.join(lacking[:5])}",
                hint="`megatrain convert import` keeps beside Megatron's model what it has no "
                "place for; import the original there, or give a configuration without it",
            )

    def warm_up(self) -> None:
        """Have everything imported that the work needs, so that its memory is its own."""
        with self.inverse():
            pass

    @contextmanager
    def inverse(self) -> Iterator[Inverse]:
        """Give the tensors of the result."""
        source, beside = TorchDistFolder(self.source), self.config / LEFT_OUT
        wanted = {name: each.spec for name, each in self.originals.items()}
        shapes = {name: spec.shape for name, spec in wanted.items()}
        with (
            self._described() as folder,
            outline(folder, DeviceMesh(), 0, shapes, alone=_alone(source)) as part,
        ):
            yield Inverse(
                part,
                wanted,
                lambda stored: read_stored(source, stored),
                SafetensorsFolder(self.config, [LEFT_OUT]) if beside.is_file() else {},
            )

    @contextmanager
    def _described(self) -> Iterator[Path]:
        """Give a folder with the configuration and an index: some bridges ask for the names."""
        with tempfile.TemporaryDirectory(prefix="megatrain-config-") as name:
            folder = Path(name)
            copy_files(self.config, folder)
            files = {tensor: each.file for tensor, each in self.originals.items()}
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
            yield folder

    def specs(self, inverse: Inverse) -> dict[str, TensorSpec]:
        """Return dtype and shape of every tensor of the result."""
        source, result = TorchDistFolder(self.source), {}
        for name in inverse.names:
            dtype, producers = self.originals[name].spec.dtype, inverse.producers.get(name)
            if producers and not self.keeps_dtypes:
                meta = producers[0].parameter.parameter.detach()
                dtype = source.dtype(producers[0].pieces(meta)[0].key)
            if self.cast is not None and dtype.is_floating_point:
                dtype = self.cast
            result[name] = TensorSpec(dtype, self.originals[name].spec.shape)
        return result

    def shards(self, inverse: Inverse) -> dict[str, list[str]]:
        """Return the names of each file, in the order in which Megatron holds them."""
        if self.shard_bytes is None:
            files: dict[str, list[str]] = {}
            for name in inverse.names:
                files.setdefault(self.originals[name].file, []).append(name)
            return dict(sorted(files.items()))
        specs, groups, size = self.specs(inverse), [[]], 0  # type: ignore[var-annotated]
        for name in inverse.names:
            if groups[-1] and size + specs[name].num_bytes > self.shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += specs[name].num_bytes
        if len(groups) == 1:
            return {SINGLE: groups[0]}
        total = len(groups)
        return {f"model-{i:05d}-of-{total:05d}.safetensors": g for i, g in enumerate(groups, 1)}


def read_stored(source: TorchDistFolder, stored: StoredParameter) -> Tensor:
    """Return a parameter's value, put together from the checkpoint's pieces."""
    values = []
    for piece in stored.pieces(stored.parameter.parameter.detach()):
        shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
        values.append(source.read(piece.key, piece.global_offset, shape).view(piece.local_shape))
    return stored.merge(values)


def _alone(source: TorchDistFolder) -> bool:
    """Tell whether the checkpoint keeps every expert under a name of its own."""
    return any(".experts.0." in key for key in source.tensors)


def finish(folder: Path, job: ToHuggingFace) -> None:
    """Write the index, configuration and tokenizer."""
    done = Journal(folder, trusted=True).done
    copy_files(job.config, folder)
    weight_map = {name: file for file, entry in done.items() for name in entry["tensors"]}
    if set(done) != {SINGLE}:
        with job.inverse() as inverse:
            total = sum(spec.num_bytes for spec in job.specs(inverse).values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    if job.cast is not None:
        set_dtype(folder / "config.json", job.cast)
