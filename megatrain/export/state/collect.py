"""What training one adapter, or the base, consists of: gathered from any layout, whole, by name.

P entries of a rank's parameters (padded: P'), Q of them this rank's share; see train/sharded.py.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from torch import Tensor

from megatrain.errors import StateError
from megatrain.export.gather import gather, stream
from megatrain.export.rank_zero import texts_of_all
from megatrain.export.state.record import (
    GRADIENTS,
    MASTER,
    GradientRecord,
    OptimizerRecord,
    ScheduleRecord,
    StateRecord,
)
from megatrain.model.network import Network
from megatrain.model.tensor_slice import TensorSlice
from megatrain.parallel.groups import Groups
from megatrain.train.optimizer import GradientAccumulator
from megatrain.train.sharded import ShardedParameters
from megatrain.train.step import BASE, Trained, Trainer


def collect(
    trainer: Trainer,
    name: str,
    *,
    base_model: str,
    consumed_train_samples: int | None,
    with_optimizer: bool,
) -> tuple[StateRecord, Iterator[tuple[str, dict[str, Tensor]]]]:
    """Return the record, and batches of whole tensors as (kind, tensors by name) on rank 0.

    The batches come while all ranks run the iterator to its end; elsewhere than on rank 0 it
    yields nothing.  Without optimizer: weights, step and data position alone.  Collective.
    """
    trained, groups = trainer.trained[name], trainer.network.groups
    optimizer = trained.optimizer if with_optimizer else None
    shards = trained.gradients.shards
    own = [shard.optimizer_state(optimizer) if optimizer else {} for shard in shards]
    counters: dict[str, float] = {}
    if optimizer is not None:
        for shard in shards:
            counters |= shard.optimizer_counters(optimizer)
    keys, counters = _agreed([*itertools.chain(*own)], counters, groups)
    for shard, values in zip(shards, own, strict=True):
        values[MASTER] = shard.master_Q
    kinds = [MASTER, *keys]
    has_gradients = bool(with_optimizer and trained.gradients.divisor)
    if has_gradients:
        kinds.append(GRADIENTS)
        for values, gradient in zip(own, _pending(trained.gradients), strict=True):
            values[GRADIENTS] = gradient
    record = StateRecord(
        **_identity(trainer, name),
        base_model=base_model,
        consumed_train_samples=consumed_train_samples,
        **_progress(trained, counters if with_optimizer else None, with_gradients=has_gradients),
        tensors=tuple(kinds),
    )
    return record, _batches(kinds, shards, own, groups)


def _agreed(
    keys: Sequence[str], counters: dict[str, float], groups: Groups
) -> tuple[list[str], dict[str, float]]:
    """Return keys and counters of all ranks: a stage without parameters has none.  Collective."""
    everyone = [
        json.loads(text) for text in texts_of_all(json.dumps([list(keys), counters]), groups)
    ]
    for _, theirs in everyone:
        counters = counters | theirs
    return sorted({key for theirs, _ in everyone for key in theirs}), counters


def _pending(gradients: GradientAccumulator) -> list[Tensor]:
    """Return this rank's share of the gradients so far, summed over ranks; change nothing.

    Collective.
    """
    result = []
    for shard in gradients.shards:
        if not gradients.is_reduced:
            sums = shard.grad_P.clone()
            shard.reduce(1.0)
        assert shard.grad_Q is not None
        result.append(shard.grad_Q.clone())
        if not gradients.is_reduced:
            shard.zero_grad()
            shard.grad_P.copy_(sums)
    return result


def gradients(trainer: Trainer, name: str) -> dict[str, Tensor] | None:
    """Return the gradient that a step would see now: float32, whole, by name, on rank 0.

    None elsewhere.  Nothing changes: more may be added to it.  Raises StateError if there is none.
    Collective.
    """
    own, groups = trainer.trained[name].gradients, trainer.network.groups
    if own.divisor == 0:
        raise StateError("there is no gradient", hint="call forward_backward first")
    scale = 1.0 if own.is_reduced else 1.0 / own.divisor
    values = [value.mul_(scale) for value in _pending(own)]
    slices = itertools.chain.from_iterable(
        _slices(shard, value) for shard, value in zip(own.shards, values, strict=True)
    )
    return gather(slices, groups)


def _batches(
    kinds: Sequence[str],
    shards: Sequence[ShardedParameters],
    values: Sequence[dict[str, Tensor]],
    groups: Groups,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for kind in kinds:
        slices = (
            piece
            for shard, own in zip(shards, values, strict=True)
            if kind in own  # a stage, or experts, may have no such state
            for piece in _slices(shard, own[kind])
        )
        for batch in stream(slices, groups):
            yield kind, batch


def _slices(shard: ShardedParameters, values_Q: Tensor) -> Iterator[TensorSlice]:
    """Yield named slices of what there is a value of for each entry.  Collective over DP."""
    views = shard.views(shard.gather_flat(values_Q))
    for trained, view in zip(shard.trained, views, strict=True):
        if trained.tie != 1:  # the copy on the last stage is the first stage's
            for part in trained.parts:
                yield part.of(view)


def _identity(trainer: Trainer, name: str) -> dict[str, Any]:
    network = trainer.network
    adapter = None if name == BASE else network.adapters[name]
    return {
        "megatrain": version("megatrain"),
        "saved_at": time.time(),
        "adapter": name,
        "lora": None if adapter is None else asdict(adapter.spec),
        "seed": trainer.seed,
        "fingerprint": fingerprint(network),
        "base_config": json.loads((network.folder / "config.json").read_text()),
        "layout": network.groups.mesh.describe(),
        "mixed_precision": network.config.mixed_precision,
    }


def _progress(
    trained: Trained, counters: dict[str, float] | None, *, with_gradients: bool
) -> dict[str, Any]:
    """Return the counters, and with an optimizer's counters what steps it as well."""
    result: dict[str, Any] = {
        "step": trained.step,
        "num_calls": trained.num_calls if with_gradients else 0,
        "accumulation_steps": trained.accumulation_steps,
        "num_passes": trained.num_passes,
        "optimizer": None,
        "schedule": None,
        "gradients": None,
    }
    if counters is None:
        return result
    if trained.optimizer_choice is not None:
        result["optimizer"] = OptimizerRecord(
            **_choice(trained.optimizer_choice), counters=counters
        )
    if trained.schedule is not None and trained.schedule_choice is not None:
        chosen = _choice(trained.schedule_choice)
        result["schedule"] = ScheduleRecord(**chosen, state=trained.schedule.state_dict())
    if with_gradients:
        result["gradients"] = GradientRecord(
            counts={
                "divisor": trained.gradients.divisor,
                "is_sum": float(trained.gradients.is_sum),
            },
            is_reduced=trained.gradients.is_reduced,
        )
    return result


def _choice(choice: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"kind": choice[0], "options": choice[1]}


def fingerprint(network: Network) -> dict[str, Any]:
    """Return what tells one base model from another: sizes, tensors' shapes, the task."""
    config = json.loads((network.folder / "config.json").read_text())
    config = config.get("text_config", config)
    sizes = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    shapes = sorted((name, list(shape)) for name, shape in network.table.hf_shapes.items())
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    known = {key: config.get(key) for key in sizes}
    return known | {"shapes": digest, "task": network.config.task}
