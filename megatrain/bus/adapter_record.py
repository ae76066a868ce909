"""All that one rank holds of an adapter, or of a base that is trained: taken down, and put back.

Tensors by name, `NUMBER/master`, `NUMBER/sums` (gradients so far), `NUMBER/reduced` and
`NUMBER/state/KIND`, for each of the rank's shards; everything else as values that JSON can hold.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megatrain.config.lora import LoraSpec
from megatrain.train.step import BASE, Trained, Trainer

COUNTERS = ("num_passes", "num_calls", "last_lr", "step", "grad_norm")


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One adapter on one rank."""

    values: dict[str, Any]
    tensors: dict[str, Tensor]


def take_down(trainer: Trainer, name: str) -> AdapterRecord:
    """Return an adapter as it is now; its tensors are its own, not copies.  No communication."""
    trained = trainer.trained[name]
    optimizer, schedule = trained.optimizer, trained.schedule
    tensors: dict[str, Tensor] = {}
    counters = []
    for number, shard in enumerate(trained.gradients.shards):
        tensors[f"{number}/master"] = shard.master_Q
        if trained.gradients.divisor:
            tensors[f"{number}/sums"] = shard.grad_P
        if trained.gradients.is_reduced and shard.grad_Q is not None:
            tensors[f"{number}/reduced"] = shard.grad_Q
        if optimizer is not None:
            for kind, value in shard.optimizer_state(optimizer).items():
                tensors[f"{number}/state/{kind}"] = value
            counters.append(shard.optimizer_counters(optimizer))
    values = {
        "lora": None if name == BASE else asdict(trainer.network.adapters[name].spec),
        "accumulation_steps": trained.accumulation_steps,
        "optimizer": trained.optimizer_choice,
        "optimizer_counters": counters,
        "schedule": trained.schedule_choice,
        "schedule_state": None if schedule is None else schedule.state_dict(),
        "counters": {each: getattr(trained, each) for each in COUNTERS},
        "divisor": trained.gradients.divisor,
        "is_sum": trained.gradients.is_sum,
        "is_reduced": trained.gradients.is_reduced,
    }
    return AdapterRecord(values, tensors)


def copied(record: AdapterRecord) -> AdapterRecord:
    """Return it with tensors of its own, on the CPU."""
    return AdapterRecord(
        record.values,
        {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in record.tensors.items()
        },
    )


def put_back(trainer: Trainer, name: str, record: AdapterRecord, *, seed: int) -> None:
    """Make the adapter, or start to train the base, as it was taken down.  Collective."""
    values = record.values
    if name != BASE:
        trainer.network.add_adapter(name, LoraSpec.from_any(values["lora"]), seed=seed)
    trainer.add(name, accumulation_steps=values["accumulation_steps"])
    trained = trainer.trained[name]
    if values["optimizer"] is not None:
        trainer.set_optimizer(name, *values["optimizer"])
    if values["schedule"] is not None:
        trainer.set_schedule(name, *values["schedule"])
        assert trained.schedule is not None
        trained.schedule.load_state_dict(values["schedule_state"])
    for number, shard in enumerate(trained.gradients.shards):
        prefix = f"{number}/"
        own = {
            each.removeprefix(prefix): value
            for each, value in record.tensors.items()
            if each.startswith(prefix)
        }
        _fill_shard(trained, number, shard, own, values)
    for each in COUNTERS:
        setattr(trained, each, values["counters"][each])
    trained.gradients.divisor = values["divisor"]
    trained.gradients.is_sum = values["is_sum"]
    trained.gradients.is_reduced = values["is_reduced"]


@torch.no_grad()
def _fill_shard(
    trained: Trained, number: int, shard: Any, own: dict[str, Tensor], values: dict[str, Any]
) -> None:
    if trained.optimizer is not None:
        state = {
            kind.removeprefix("state/"): value
            for kind, value in own.items()
            if kind.startswith("state/")
        }
        counters = values["optimizer_counters"][number]
        shard.load_optimizer_state(trained.optimizer, state, counters)
    shard.master_Q.copy_(own["master"])
    shard.write_parameters()
    shard.set_gradients(own.get("sums"), own.get("reduced"))
