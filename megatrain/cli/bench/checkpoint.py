"""A random checkpoint of any size, written shard by shard; Transformers says what is in it.

Run as a process of its own: `python -m megatrain.cli.bench.checkpoint JOB.json`.  No Megatron here.
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from megatrain.cli.bench.job import BYTES, Job
from megatrain.cli.bench.shapes import Shape
from megatrain.cli.quickstart.child import report_failure
from megatrain.errors import ConfigError

MARKER = "bench.json"
"""In the checkpoint: what it was made from, and the shape of each tensor."""

SHARD_BYTES = 2 << 30
"""The most that is held in memory at a time, unless one tensor is larger."""

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


class Wanted(Protocol):
    """What a benchmark's job says of its checkpoint."""

    @property
    def checkpoint(self) -> Path:
        """Where it will be."""
        ...

    @property
    def shape(self) -> Shape:
        """The model."""
        ...

    @property
    def dtype(self) -> str:
        """A key of DTYPES."""
        ...

    @property
    def seed(self) -> int:
        """Of the values."""
        ...


def make_checkpoint(job: Wanted, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the checkpoint unless it is there already; it appears whole or not at all.

    Raises ConfigError when the disk is too small for it.
    """
    facts = fingerprint(job) | {"shard_bytes": shard_bytes}
    marker = job.checkpoint / MARKER
    if marker.is_file() and json.loads(marker.read_text())["made_from"] == facts:
        print(f"the checkpoint in {job.checkpoint} is of this shape already")
        return
    shutil.rmtree(job.checkpoint, ignore_errors=True)
    partial = job.checkpoint.with_name(f"{job.checkpoint.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = skeleton(job)
    shapes = tensor_shapes(model)
    _check_space(partial, shapes, entry_bytes=BYTES[job.dtype])
    shards = list(_shards(shapes, shard_bytes // BYTES[job.dtype]))
    _write_shards(partial, shapes, shards, dtype=DTYPES[job.dtype], seed=job.seed)
    model.config.save_pretrained(partial)
    config = model.config.to_dict()
    text = json.dumps({"made_from": facts, "config": config, "tensors": shapes}, default=str)
    (partial / MARKER).write_text(text)
    partial.rename(job.checkpoint)


def fingerprint(job: Wanted) -> dict[str, Any]:
    """Return all that the checkpoint depends on."""
    return {
        "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "config_class": job.shape.config_class,
        "fields": job.shape.fields,
        "dtype": job.dtype,
        "seed": job.seed,
        "transformers": version("transformers"),
    }


def skeleton(job: Wanted) -> PreTrainedModel:
    """Return the model without weights."""
    config = getattr(transformers, job.shape.config_class)(**job.shape.fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[job.dtype])
    model.config.architectures = [type(model).__name__]
    model.config.dtype = DTYPES[job.dtype]
    return model


def tensor_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return names and shapes as Transformers would save them: experts one by one, for one."""
    saved = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(value.shape) for name, value in sorted(saved.items())}


def random_tensor(name: str, shape: tuple[int, ...], *, dtype: torch.dtype, seed: int) -> Tensor:
    """Return a tensor that depends on seed and name alone, on one kind of device.

    Matrices keep the size of what they multiply; norms are about one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
    value = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    if len(shape) > 1:
        value.mul_(1 / math.sqrt(math.prod(shape[1:])))
    elif "norm" in name:
        value.mul_(0.1).add_(1.0)
    else:
        value.mul_(0.5)
    return value.to(dtype).cpu()


def _check_space(folder: Path, shapes: Mapping[str, tuple[int, ...]], *, entry_bytes: int) -> None:
    needed = sum(math.prod(shape) for shape in shapes.values()) * entry_bytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"the checkpoint needs {needed / 1e9:.1f} GB of disk: {folder.parent} has "
            f"{free / 1e9:.1f} GB free",
            hint="choose another folder with --cache, for example one in /dev/shm",
        )


def _write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    shards: list[list[str]],
    *,
    dtype: torch.dtype,
    seed: int,
) -> None:
    places: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}.safetensors"
        tensors = {n: random_tensor(n, shapes[n], dtype=dtype, seed=seed) for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        total += sum(value.nbytes for value in tensors.values())
        print(f"{file}: {len(names)} tensors, {total / 1e9:.2f} GB so far", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _shards(shapes: Mapping[str, tuple[int, ...]], entries: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if names and held + size > entries:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


if __name__ == "__main__":
    the_job = Job.read(sys.argv[1])
    with report_failure(the_job.folder, name="checkpoint"):
        make_checkpoint(the_job)
