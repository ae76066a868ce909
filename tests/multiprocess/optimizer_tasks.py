"""What ranks do for the tests of optimizers: steps on gradients that depend on names alone."""

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatrain.train.schedule import make_schedule
from tests.multiprocess.tasks import error_of, make_model


def random_gradient(name: str, shape: Sequence[int], step: int) -> Tensor:
    """Return the same numbers for a name and step everywhere."""
    digest = hashlib.blake2b(f"{step}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(tuple(shape), generator=generator)


def set_gradients(model: Any, step: int) -> None:
    """Put random gradients where backward would, each on one of the ranks that are summed over."""
    gradients = model._trainer.trained[model._name(None)].gradients
    gradients.zero()
    gradients.divisor = 1
    for shard in gradients.shards:
        if shard.data_group.rank() > 0:
            continue
        for trained, view in zip(shard.trained, shard.views(shard.grad_P), strict=True):
            if (trained.is_replicated and shard.tp_group.rank() > 0) or trained.tie == 1:
                continue
            for part in trained.parts:
                part.put(view, part.cut(random_gradient(part.name, part.full_shape, step)))


def optimize(
    folder: Any, lora: dict[str, Any], kind: str, options: dict[str, Any], num_steps: int
) -> dict[str, Any]:
    """Return the trained tensors before and after some steps, and the optimizer's groups."""
    model = make_model(folder, lora)
    model.set_optimizer(kind, **options)
    initial = model.get_state_dict()
    for step in range(num_steps):
        set_gradients(model, step)
        model.step()
    trained = model._trainer.trained[model._name(None)]
    return {
        "initial": initial,
        "after": model.get_state_dict(),
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in trained.optimizer.param_groups
        ],
        "sizes": [
            sum(p.numel() for p in group["params"]) for group in trained.optimizer.param_groups
        ],
        "devices": sorted({str(shard.master_Q.device) for shard in trained.gradients.shards}),
    }


def interrupted(
    folder: Any, lora: dict[str, Any], kind: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Return four steps at once; and two, the optimizer's state carried to another, two more."""
    straight = optimize(folder, lora, kind, options, 4)["after"]
    model = make_model(folder, lora)
    model.set_optimizer(kind, **options)
    for step in range(2):
        set_gradients(model, step)
        model.step()
    trained = model._trainer.trained[model._name(None)]
    old, shards = trained.optimizer, trained.gradients.shards
    saved = [(s.optimizer_state(old), s.optimizer_counters(old)) for s in shards]
    model.set_optimizer(kind, **options)
    for shard, (state, counters) in zip(shards, saved, strict=True):
        shard.load_optimizer_state(trained.optimizer, state, counters)
    again = [shard.optimizer_state(trained.optimizer) for shard in shards]
    same = all(
        torch.equal(state[key], new[key]) and state.keys() == new.keys()
        for (state, _), new in zip(saved, again, strict=True)
        for key in state
    )
    for step in range(2, 4):
        set_gradients(model, step)
        model.step()
    short = {key: value[:-1] for key, value in saved[0][0].items()}
    return {
        "straight": straight,
        "resumed": model.get_state_dict(),
        "same_state": same,
        "keys": sorted(saved[0][0]),
        "counters": saved[0][1],
        "shapes": [tuple(value.shape) == (shards[0].shard_size,) for value in saved[0][0].values()],
        "short": error_of(
            lambda: shards[0].load_optimizer_state(trained.optimizer, short, saved[0][1])
        ),
    }


def refusal(folder: Any, lora: dict[str, Any], kind: str, options: dict[str, Any]) -> Any:
    """Return the error of set_optimizer."""
    return error_of(lambda: make_model(folder, lora).set_optimizer(kind, **options))


def rates_here_and_in_megatron(
    lr: float, options: dict[str, Any], num_steps: int
) -> tuple[list[float], list[float]]:
    """Return the learning rates of the schedule `default`, and those of megatron-core."""
    from megatron.core.optimizer_param_scheduler import (
        OptimizerParamScheduler,
    )

    over = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule, other = make_schedule("default", over, options), SimpleNamespace(param_groups=[{}])
    names = {"max_lr": lr, "min_lr": 0.0, "lr_warmup_steps": 0, "lr_decay_style": "cosine"}
    theirs = {name: options.get(name, value) for name, value in names.items()}
    expected = OptimizerParamScheduler(
        other,
        **theirs,
        init_lr=options.get("lr_warmup_init", 0.0),
        lr_decay_steps=options["lr_decay_steps"],
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    here, there = [], []
    for _ in range(num_steps):
        here.append(over.param_groups[0]["lr"])
        there.append(other.param_groups[0]["lr"])
        over.step()
        schedule.step()
        expected.step(1)
    return here, there
