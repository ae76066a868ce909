"""Schedules give Transformers' rates, and go on where they were saved."""

import json
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from megatrain.errors import ConfigError
from megatrain.train.schedule import SCHEDULES, make_schedule

LR = 3e-4
STEPS = 30
WARM = {"num_warmup_steps": 5}
FULL = WARM | {"num_training_steps": 20}
CASES: dict[str, dict[str, Any]] = {
    "linear": FULL,
    "cosine": FULL | {"num_cycles": 0.25},
    "cosine_with_restarts": FULL | {"num_cycles": 3},
    "polynomial": FULL | {"lr_end": 1e-6, "power": 2.0},
    "constant": {},
    "constant_with_warmup": WARM,
    "inverse_sqrt": WARM | {"timescale": 4},
    "cosine_with_min_lr": FULL | {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": FULL | {"min_lr": 1e-5},
    "warmup_stable_decay": FULL | {"num_decay_steps": 6},
}
MEGATRON = {"lr_decay_steps": 20, "lr_warmup_steps": 4, "lr_warmup_init": 1e-5, "min_lr": 2e-5}


def optimizer(ratio: float = 4.0) -> torch.optim.Optimizer:
    """Return an optimizer with two groups, the second as LoRA+ has it."""
    new = lambda: torch.nn.Parameter(torch.zeros(1))  # noqa: E731
    groups = [{"params": [new()]}, {"params": [new()], "lr": LR * ratio}]
    return torch.optim.AdamW(groups, lr=LR)


def rates(schedule: Any, over: torch.optim.Optimizer, steps: int = STEPS) -> list[list[float]]:
    """Return the learning rates of all groups before each step."""
    result = []
    for _ in range(steps):
        result.append([group["lr"] for group in over.param_groups])
        over.step()
        schedule.step()
    return result


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_by_name_is_transformers(name):
    ours, theirs = optimizer(), optimizer()
    more = {k: v for k, v in CASES[name].items() if k not in FULL}
    first = {k: v for k, v in CASES[name].items() if k in FULL}
    expected = get_scheduler(name, theirs, **first, scheduler_specific_kwargs=more)
    assert rates(make_schedule(name, ours, CASES[name]), ours) == rates(expected, theirs)


def test_every_schedule_of_transformers_is_known():
    assert CASES.keys() <= SCHEDULES.keys()
    assert {name for name in SCHEDULES if not name.endswith("Scheduler")} == CASES.keys()


def test_a_count_that_may_be_none_is_none():
    over = optimizer()
    options = FULL | {"num_decay_steps": 6, "num_stable_steps": None}
    assert rates(make_schedule("warmup_stable_decay", over, options), over)[5][0] == LR


def test_groups_keep_their_ratio():
    over = optimizer()
    schedule = make_schedule("default", over, {"lr_decay_steps": 10, "max_lr": 1e-3})
    assert all(b == pytest.approx(4 * a, rel=1e-14) for a, b in rates(schedule, over))


def test_more_warmup_than_training_warms_up_to_the_end():
    over = optimizer()
    options = {"num_warmup_steps": 500, "num_training_steps": 10}
    schedule = make_schedule("CosineWarmupScheduler", over, options)
    assert [a for a, _ in rates(schedule, over, 10)] == [LR * (i / 500) for i in range(10)]


@pytest.mark.parametrize("name", ["cosine", "warmup_stable_decay", "default"])
def test_a_schedule_goes_on_bit_for_bit_from_json(name):
    options = {**CASES, "default": MEGATRON}[name]
    over = optimizer()
    schedule = make_schedule(name, over, options)
    straight = rates(schedule, over)
    old, new = optimizer(), optimizer()
    first = make_schedule(name, old, options)
    begun = rates(first, old, 7)
    second = make_schedule(name, new, options)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + rates(second, new, STEPS - 7) == straight
    assert second.get_last_lr() == schedule.get_last_lr()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cosin", {}, "did you mean 'cosine'"),
        ("cosine", {"num_warmup_step": 1}, "did you mean 'num_warmup_steps'"),
        ("cosine", {"num_warmup_steps": 1}, "num_training_steps"),
        ("cosine", {"last_epoch": 3, **FULL}, "last_epoch"),
        ("cosine_with_min_lr", FULL, "min_lr"),
        ("reduce_lr_on_plateau", {}, "metric"),
        ("default", {}, "lr_decay_steps"),
        ("default", {"lr": 1.0, "lr_decay_steps": 3}, "lr"),
        ("default", {"lr_decay_steps": 0}, "positive"),
        ("default", {"lr_decay_steps": 5, "min_lr": 1.0}, "min_lr"),
        ("default", {"lr_decay_steps": 5, "lr_decay_style": "cos"}, "did you mean 'cosine'"),
        ("default", {"lr_decay_steps": 5, "lr_warmup_steps": 5}, "more than lr_warmup_steps"),
        ("default", {"lr_decay_steps": 5.5}, "lr_decay_steps must be a whole number"),
        ("cosine", FULL | {"num_training_steps": None}, "whole number, 0 or more: None"),
        ("cosine", FULL | {"num_training_steps": "20"}, "whole number, 0 or more: '20'"),
        ("linear", FULL | {"num_warmup_steps": -1}, "whole number, 0 or more: -1"),
        ("linear", FULL | {"num_warmup_steps": True}, "whole number, 0 or more: True"),
        ("warmup_stable_decay", WARM | {"num_decay_steps": 0.5}, "num_decay_steps must be"),
        ("cosine", FULL | {"num_cycles": "two"}, "no learning rate at step"),
        ("polynomial", dict.fromkeys(FULL, 5), "no learning rate at step 5"),
        ("inverse_sqrt", WARM | {"timescale": -3}, "learning rate at step"),
        ("polynomial", FULL | {"power": float("nan")}, "by nan"),
    ],
)
def test_a_wrong_schedule_is_refused_and_no_rate_has_changed(name, options, words):
    over = optimizer()
    with pytest.raises(ConfigError) as caught:
        make_schedule(name, over, options)
    assert words in str(caught.value)
    assert [group["lr"] for group in over.param_groups] == [LR, LR * 4.0]
