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

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatrain.bus.commands import AddAdapter, ApplyPatch, OpenModel, SetLoss
from megatrain.bus.model_host import ModelHost
from megatrain.config.lora import LoraSpec
from megatrain.errors import CheckpointError
from megatrain.export.state.record import checksum
from megatrain.export.state.writer import BackgroundWriter
from megatrain.parallel.joined import Session
from megatrain.train.step import BASE, Trained

COUNTERS = ("num_passes", "num_calls", "last_lr", "step", "grad_norm")

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
    copies = {name: _copy(value) for name, value in tensors.items()}
    rank, layout = session.groups.rank, session.groups.mesh.to_dict()

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        values = rank_file(directory, rank, "safetensors")
        _appear(values, lambda path: save_file(copies, path))
        record = {"layout": layout, "checksum": checksum(values), "models": models}
        _appear(
            rank_file(directory, rank, "json"), lambda path: path.write_text(json.dumps(record))
        )

    _writer.start(write)


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _appear(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is whole and on the disk under its name, or not there."""
    hidden = path.with_name(f".{path.name}.partial")
    write(hidden)
    with hidden.open("rb") as file:
        os.fsync(file.fileno())
    hidden.rename(path)


def _describe(key: str, host: ModelHost, tensors: dict[str, Tensor]) -> dict[str, Any]:
    trained = host.trainer.trained
    return {
        "opened": asdict(host.opened),
        "seed": host.trainer.seed,
        "patches": [asdict(each) for each in host.patches],
        "adapters": {
            name: _describe_adapter(f"{key}/{name}", host, name, tensors) for name in trained
        },
    }


def _describe_adapter(
    prefix: str, host: ModelHost, name: str, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    trained, loss = host.trainer.trained[name], host.loss_choices.get(name)
    optimizer, schedule = trained.optimizer, trained.schedule
    counters = []
    for number, shard in enumerate(trained.gradients.shards):
        tensors[f"{prefix}/{number}/master"] = shard.master_Q
        if trained.gradients.divisor:
            tensors[f"{prefix}/{number}/sums"] = shard.grad_P
        if trained.gradients.is_reduced and shard.grad_Q is not None:
            tensors[f"{prefix}/{number}/reduced"] = shard.grad_Q
        if optimizer is not None:
            for kind, value in shard.optimizer_state(optimizer).items():
                tensors[f"{prefix}/{number}/state/{kind}"] = value
            counters.append(shard.optimizer_counters(optimizer))
    return {
        "lora": None if name == BASE else asdict(host.trainer.network.adapters[name].spec),
        "accumulation_steps": trained.accumulation_steps,
        "optimizer": trained.optimizer_choice,
        "optimizer_counters": counters,
        "schedule": trained.schedule_choice,
        "schedule_state": None if schedule is None else schedule.state_dict(),
        "loss": None if loss is None else asdict(loss),
        "counters": {each: getattr(trained, each) for each in COUNTERS},
        "divisor": trained.gradients.divisor,
        "is_reduced": trained.gradients.is_reduced,
        "metrics": host.metrics_of(name).to_dict(),
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
    for name, each in record["adapters"].items():
        if name == BASE:
            host.trainer.add(BASE, accumulation_steps=each["accumulation_steps"])
        else:
            spec = asdict(LoraSpec.from_any(each["lora"]))
            steps = each["accumulation_steps"]
            host.run(AddAdapter(adapter=name, lora=spec, accumulation_steps=steps))
        _fill(host, name, each, f"{key}/{name}", tensors)
    return host


def _fill(
    host: ModelHost, name: str, record: dict[str, Any], prefix: str, tensors: dict[str, Tensor]
) -> None:
    trainer, trained = host.trainer, host.trainer.trained[name]
    if record["optimizer"] is not None:
        trainer.set_optimizer(name, *record["optimizer"])
    if record["schedule"] is not None:
        trainer.set_schedule(name, *record["schedule"])
        assert trained.schedule is not None
        trained.schedule.load_state_dict(record["schedule_state"])
    if record["loss"] is not None:
        host.run(SetLoss(**record["loss"]))
    for number, shard in enumerate(trained.gradients.shards):
        own = {
            each.removeprefix(f"{prefix}/{number}/"): value
            for each, value in tensors.items()
            if each.startswith(f"{prefix}/{number}/")
        }
        _fill_shard(trained, number, shard, own, record)
    for each in COUNTERS:
        setattr(trained, each, record["counters"][each])
    trained.gradients.divisor = record["divisor"]
    trained.gradients.is_reduced = record["is_reduced"]
    host.metrics_of(name).load_dict(record["metrics"])


@torch.no_grad()
def _fill_shard(
    trained: Trained, number: int, shard: Any, own: dict[str, Tensor], record: dict[str, Any]
) -> None:
    if trained.optimizer is not None:
        state = {
            kind.removeprefix("state/"): value
            for kind, value in own.items()
            if kind.startswith("state/")
        }
        counters = record["optimizer_counters"][number]
        shard.load_optimizer_state(trained.optimizer, state, counters)
    shard.master_Q.copy_(own["master"])
    shard.write_parameters()
    shard.set_gradients(own.get("sums"), own.get("reduced"))
