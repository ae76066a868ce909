"""All that a rank holds, in one file of its own, so that ranks which start anew go on exactly.

    DIR/rank-00003.safetensors   masters, optimizer state, gradients of this rank, as they are
    DIR/rank-00003.json          what they belong to; written last, with the other file's checksum

For the same layout: what is to outlive a run, on any layout, is `model.save`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatrain.bus.adapter_record import AdapterRecord, copied
from megatrain.bus.commands import ApplyPatch, OpenModel, SetLoss
from megatrain.bus.model_host import ModelHost
from megatrain.errors import CheckpointError
from megatrain.export.state.record import checksum
from megatrain.export.state.writer import BackgroundWriter
from megatrain.parallel.joined import Session

_writer = BackgroundWriter()


def rank_file(directory: Path, rank: int, kind: str) -> Path:
    """Return the path of a rank's file."""
    return directory / f"rank-{rank:05d}.{kind}"


def take(directory: Path, hosts: dict[str, ModelHost], session: Session) -> None:
    """Copy everything now, and write it in the background.  No communication.

    Raises CheckpointError if the snapshot before could not be written.
    """
    _writer.wait()
    tensors: dict[str, Tensor] = {}
    models = {key: _describe(key, host, tensors) for key, host in hosts.items()}
    rank, layout = session.groups.rank, session.groups.mesh.to_dict()
    text = json.dumps(models)  # what JSON cannot hold is said now

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        values = rank_file(directory, rank, "safetensors")
        _appear(values, lambda path: save_file(tensors, path))
        record = {"layout": layout, "checksum": checksum(values), "models": json.loads(text)}
        _appear(
            rank_file(directory, rank, "json"), lambda path: path.write_text(json.dumps(record))
        )

    _writer.start(write)


def _appear(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is whole and on the disk under its name, or not there."""
    hidden = path.with_name(f".{path.name}.partial")
    write(hidden)
    with hidden.open("rb") as file:
        os.fsync(file.fileno())
    hidden.rename(path)


def _describe(key: str, host: ModelHost, tensors: dict[str, Tensor]) -> dict[str, Any]:
    adapters = {}
    for name in host.trained:
        record, loss = host.residents.record(name), host.loss_choices.get(name)
        if name in host.residents.tiers()["device"]:
            record = copied(record)
        tensors |= {f"{key}/{name}/{each}": value for each, value in record.tensors.items()}
        adapters[name] = record.values | {
            "loss": None if loss is None else asdict(loss),
            "metrics": host.metrics_of(name).to_dict(),
        }
    return {
        "opened": asdict(host.opened),
        "seed": host.trainer.seed,
        "patches": [asdict(each) for each in host.patches],
        "adapters": adapters,
    }


def restore(directory: Path, session: Session) -> dict[str, ModelHost]:
    """Return the models of a snapshot, as they were.  Collective.

    Raises CheckpointError for a file that is missing or altered, or another layout.
    """
    groups = session.groups
    values = rank_file(directory, groups.rank, "safetensors")
    try:
        record = json.loads(rank_file(directory, groups.rank, "json").read_text())
        is_whole = checksum(values) == record["checksum"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"no whole snapshot in {directory}: {error}") from error
    if not is_whole:
        raise CheckpointError(f"altered: {values} does not have the checksum it was written with")
    if record["layout"] != groups.mesh.to_dict():
        raise CheckpointError(
            f"a snapshot is for the layout it was taken on: {directory} has {record['layout']}, "
            f"these ranks are {groups.mesh.to_dict()}",
            hint="start as many ranks as before; model.save writes what any layout reads",
        )
    tensors = load_file(values)
    return {key: _rebuild(key, model, tensors, session) for key, model in record["models"].items()}


def _rebuild(
    key: str, record: dict[str, Any], tensors: dict[str, Tensor], session: Session
) -> ModelHost:
    host = ModelHost(OpenModel(**record["opened"]), session)
    host.trainer.seed = record["seed"]
    for patch in record["patches"]:
        host.run(ApplyPatch(**patch))
    for name, values in record["adapters"].items():
        prefix = f"{key}/{name}/"
        own = {
            each.removeprefix(prefix): value
            for each, value in tensors.items()
            if each.startswith(prefix)
        }
        loss, metrics = values.pop("loss"), values.pop("metrics")
        host.residents.adopt(name, AdapterRecord(values, own))
        if loss is not None:
            host.run(SetLoss(**loss))
        host.metrics_of(name).load_dict(metrics)
    return host
