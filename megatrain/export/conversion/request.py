"""A conversion as JSON, for processes that each do a share of it."""

from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.safetensors_file import TensorSpec
from megatrain.export.conversion.carried import Original, dtype_named
from megatrain.export.conversion.to_hugging_face import ToHuggingFace
from megatrain.export.conversion.to_megatron import ToMegatron
from megatrain.parallel.layout import DeviceMesh

Job = ToMegatron | ToHuggingFace


def to_json(job: Job) -> dict[str, Any]:
    """Return what `from_json` makes the same job of."""
    common = {"source": str(job.source.resolve()), "cast": _name(job.cast)}
    match job:
        case ToMegatron():
            return {
                **common,
                "kind": "import",
                "mesh": job.mesh.to_dict(),
                "file_bytes": job.file_bytes,
                "allow_pickle": job.allow_pickle,
            }
        case ToHuggingFace():
            originals = {
                name: [_name(each.spec.dtype), list(each.spec.shape), each.file]
                for name, each in job.originals.items()
            }
            return {
                **common,
                "kind": "export",
                "config": str(job.config.resolve()),
                "originals": originals,
                "keeps_dtypes": job.keeps_dtypes,
                "shard_bytes": job.shard_bytes,
            }


def from_json(request: dict[str, Any]) -> Job:
    """Return the job."""
    source, cast = Path(request["source"]), _dtype(request["cast"])
    if request["kind"] == "import":
        return ToMegatron(
            source,
            DeviceMesh(**request["mesh"]),
            cast,
            request["file_bytes"],
            request["allow_pickle"],
        )
    originals = {}
    for name, (dtype, shape, file) in request["originals"].items():
        originals[name] = Original(TensorSpec(dtype_named(dtype), tuple(shape)), file)
    return ToHuggingFace(
        source,
        Path(request["config"]),
        originals,
        keeps_dtypes=request["keeps_dtypes"],
        cast=cast,
        shard_bytes=request["shard_bytes"],
    )


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else dtype_named(name)
