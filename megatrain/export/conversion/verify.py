"""Check a conversion against its source, by the way that it did not go.

An import is undone and compared with the Hugging Face tensors; an export is loaded as for training
and compared with Megatron's parameters.  Bytes must be equal, after the cast that was asked for.
"""

from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.torch_dist_read import TorchDistFolder
from megatrain.errors import ExportError
from megatrain.export.adapters.base import open_base
from megatrain.export.conversion.carried import FOLDER, originals_of
from megatrain.export.conversion.to_hugging_face import ToHuggingFace, read_stored
from megatrain.export.conversion.to_megatron import ToMegatron, read_parameter
from megatrain.model.outline import outline
from megatrain.parallel.layout import DeviceMesh


def verify_import(job: ToMegatron, folder: Path) -> int:
    """Return the number of tensors that came back as they were.  Raises ExportError otherwise."""
    source = job.open()
    back = ToHuggingFace(
        folder,
        folder / FOLDER,
        originals_of(source),
        keeps_dtypes=True,
        cast=None,
        shard_bytes=None,
    )
    with back.inverse() as inverse:
        for name in inverse.names:
            wanted, value = source.plain[name].to(source.spec(name).dtype), inverse.value(name)
            if job.cast is not None and wanted.dtype.is_floating_point:
                wanted = wanted.to(job.cast)
            _check(name, value.to(wanted.dtype), wanted)
        return len(inverse.names)


def verify_export(job: ToHuggingFace, folder: Path) -> int:
    """Return the number of parameters that load as Megatron has them.  Raises ExportError."""
    source, result = TorchDistFolder(job.source), open_base(folder)
    with job.inverse() as inverse:
        producers = {
            stored.parameter.global_name: stored
            for each in inverse.producers.values()
            for stored in each
        }
    with outline(folder, DeviceMesh(), 0, result.stored.shapes()) as part:
        for stored in part.stored:
            name = stored.parameter.global_name
            wanted = read_stored(source, producers[name])
            value = read_parameter(part, stored, result, wanted.dtype)
            if job.cast is not None and wanted.dtype.is_floating_point:
                wanted = wanted.to(job.cast).to(wanted.dtype)
            _check(name, value, wanted)
    return len(producers)


def _check(name: str, value: Tensor, wanted: Tensor) -> None:
    same = value.dtype == wanted.dtype and value.shape == wanted.shape
    one, other = (x.contiguous().reshape(-1).view(torch.uint8) for x in (value, wanted))
    if not same or not torch.equal(one, other):
        raise ExportError(
            f"{name} came out as {value.dtype} {tuple(value.shape)}, other than {wanted.dtype} "
            f"{tuple(wanted.shape)} went in",
            hint="nothing was written to the target; please report the model's config.json",
        )
