"""A step's options are checked, whichever of the API's two names for them they come under."""

import time
from typing import Any

import pytest

from megatrain.errors import DataError
from megatrain.service.intake import new_run
from megatrain.service.work.operations import step_options
from megatrain.service.work.run_queue import RunQueue
from megatrain.service.work.run_state import RunState


def run(kind: str = "adamw") -> RunState:
    record = new_run(
        "session", 0, "alice", "base", lora={"rank": 2}, optimizer={"type": kind}, user_metadata={}
    )
    return RunState(record, RunQueue(0))


def test_adamw_has_all_its_options_under_both_names() -> None:
    given = {"learning_rate": 0.5, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1}
    expected = (0.0, {"lr": 0.5, "betas": [0.9, 0.9], "eps": 1e-8, "weight_decay": 0.1})
    assert step_options(run(), {"adam_params": given}) == expected
    assert step_options(run(), {"optimizer_params": {"type": "adamw", **given}}) == expected
    dimuon = {"type": "dimuon", "learning_rate": 0.5, "beta1": 0.8, "grad_clip_norm": 1.0}
    found = step_options(run("dimuon"), {"optimizer_params": dimuon})
    assert found == (1.0, {"lr": 0.5, "momentum": 0.8})


@pytest.mark.parametrize(
    "wrong",
    [
        {"eps": "small"},
        {"beta2": 1.0},
        {"weight_decay": float("inf")},
        {"eps": None},
        {"beta2": []},
    ],
)
def test_options_that_no_optimizer_takes_are_the_users_mistake(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong))):
        step_options(run(), {"optimizer_params": {"type": "adamw", **wrong}})


def test_a_number_far_ahead_leaves_a_gap_that_is_told_in_no_time() -> None:
    queue: RunQueue[str] = RunQueue(1)
    queue.put(2**31 - 1, "far ahead", 0.0)
    began = time.monotonic()
    assert queue.missing()[:3] == [1, 2, 3]
    assert queue.give_up_gap(1.0) == ["far ahead"]
    assert time.monotonic() - began < 1.0
