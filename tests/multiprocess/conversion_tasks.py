"""What ranks do in the tests of conversion.

Megatron is imported inside the functions: the test process has not prepared it.
"""

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import megatrain
from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.errors import ExportError
from megatrain.parallel.layout import DeviceMesh


def import_checkpoint(folder: Path, target: Path, mesh: DeviceMesh, **options: Any) -> dict:
    """Convert to Megatron's format, in this one process."""
    from megatrain.export.conversion.run import check, convert
    from megatrain.export.conversion.to_megatron import ToMegatron

    megatrain.shutdown()
    job = ToMegatron(folder, mesh, options.pop("cast", None), options.pop("file_bytes", 100_000))
    check(job, target)
    return convert(
        job,
        target,
        **{"needed_bytes": 0, "workers": 1, "restart": False, "verify": True}
        | options
        | {"progress": lambda num_bytes: None},
    )


def export_checkpoint(
    source: Path, target: Path, config: Path | None = None, **options: Any
) -> dict:
    """Convert to a Hugging Face checkpoint, in this one process."""
    from megatrain.export.conversion.carried import FOLDER, read_originals
    from megatrain.export.conversion.expected import expected_originals
    from megatrain.export.conversion.run import check, convert
    from megatrain.export.conversion.to_hugging_face import ToHuggingFace

    megatrain.shutdown()
    config = config or source / FOLDER
    carried = read_originals(config)
    job = ToHuggingFace(
        source,
        config,
        expected_originals(config) if carried is None else carried,
        keeps_dtypes=carried is not None,
        cast=options.pop("cast", None),
        shard_bytes=options.pop("shard_bytes", None if carried else 10**9),
    )
    check(job, target)
    return convert(
        job,
        target,
        **{"needed_bytes": 0, "workers": 1, "restart": False, "verify": True}
        | options
        | {"progress": lambda num_bytes: None},
    )


def in_small_files(task: Callable[..., Any], *args: Any) -> Any:
    """Convert to files of 100 kB."""
    options = {"shard_bytes": 100_000} if task is export_checkpoint else {}
    return task(*args, **options)


def error_of_conversion(task: Callable[..., Any], *args: Any) -> str:
    """Return what a conversion to small files says when it fails."""
    with pytest.raises(ExportError) as failure:
        in_small_files(task, *args)
    return str(failure.value)


def round_trip(folder: Path, tmp_path: Path, meshes: list[DeviceMesh]) -> list[str]:
    """Import on each layout, export, and return the tensors that came back otherwise."""
    wrong = []
    for index, mesh in enumerate(meshes):
        middle, back = tmp_path / f"megatron-{index}", tmp_path / f"back-{index}"
        import_checkpoint(folder, middle, mesh, verify=False)
        export_checkpoint(middle, back, verify=False)
        wrong += [f"{mesh.describe()}: {name}" for name in different(folder, back)]
        shutil.rmtree(middle)
        shutil.rmtree(back)
    return wrong


def different(one: Path, other: Path) -> list[str]:
    """Return the tensors that two checkpoints do not both have, byte for byte."""
    a, b = SafetensorsFolder(one), SafetensorsFolder(other)
    return sorted(
        {*a} ^ {*b}
        | {
            name
            for name in {*a} & {*b}
            if a.dtype(name) != b.dtype(name)
            or not torch.equal(
                a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)
            )
        }
    )


def megatron_loads(folder: Path, converted: Path) -> list[str]:
    """Let Megatron load a converted checkpoint; return parameters that differ from ours."""
    from megatron.core import dist_checkpointing

    from megatrain.export.conversion.to_megatron import ITERATION

    model = megatrain.MegatronModel(model_id=str(folder), mixed_precision="no")
    network = model._network
    wanted = [parameter.parameter.detach().clone() for parameter in network.table.parameters]
    for parameter in network.table.parameters:
        parameter.parameter.detach().zero_()
    metadata = {"singleton_local_shards": False, "dp_cp_group": network.groups.data}
    for chunk in network.chunks:
        state = {"model": chunk.sharded_state_dict(metadata=metadata)}
        loaded = dist_checkpointing.load(state, str(converted / ITERATION))
        chunk.load_state_dict(loaded["model"])
    return [
        parameter.global_name
        for parameter, value in zip(network.table.parameters, wanted, strict=True)
        if not torch.equal(parameter.parameter, value)
    ]


def megatron_saves(folder: Path, target: Path) -> None:
    """Let Megatron save a model in its own way."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    model = megatrain.MegatronModel(model_id=str(folder), mixed_precision="no")
    network = model._network
    metadata = {"singleton_local_shards": False, "dp_cp_group": network.groups.data}
    # Megatron writes in processes of its own, which a daemon, as these ranks are, may not have.
    multiprocessing.current_process()._config["daemon"] = False
    if network.groups.rank == 0:
        target.mkdir(parents=True)
    torch.distributed.barrier()
    (chunk,) = network.chunks
    before = set(psutil.Process().children(recursive=True))
    dist_checkpointing.save(chunk.sharded_state_dict(metadata=metadata), str(target))
    # Its writers stay for the next save, and would outlive these ranks, which are killed.
    for child in set(psutil.Process().children(recursive=True)) - before:
        if "resource_tracker" not in " ".join(child.cmdline()):
            child.kill()
    filesystem_async._results_queue = None
