"""What the tests of the bus run in ranks: faults at a phase, by a patch; and one short training."""

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import megatrain
from megatrain.bus.driver import Driver
from megatrain.bus.events import Event
from megatrain.model.patch import Patch
from megatrain.parallel import phase
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess.data import random_batch

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
TP2_PP2, EP2_DP2 = DeviceMesh(tp=2, pp=2), DeviceMesh(ep=2, dp=2)
PHASES = ("validating", "forward", "backward", "optimizer step", "saving", "gathering")
"""Those in which a rank is killed; `idle` is hit from outside."""


class Fault(Patch):
    """Does something to this process when its rank enters a phase for the n-th time.

    Once in all: a file says that it has happened, so that the ranks which start anew go on.
    """

    name, reason = "fault", "a test wants this rank to fail"

    def __init__(
        self,
        folder: str,
        rank: int,
        at: str,
        count: int = 1,
        action: str = "SIGKILL",
        times: int = 1,
    ) -> None:
        """`folder` holds the marks of what has happened; `times` is how often it may happen."""
        self._marks = [
            Path(folder) / f"{rank}-{at}-{count}-{n}".replace(" ", "_") for n in range(times)
        ]
        self._rank, self._at, self._left, self._action = rank, at, count, action

    def apply(self, model: Any) -> None:
        inner = phase._observer
        if int(os.environ.get("RANK", "0")) == self._rank:

            def observe(name: str) -> None:
                if inner is not None:
                    inner(name)
                if name == self._at:
                    self._enter()

            phase.observe(observe)

    def _enter(self) -> None:
        self._left -= 1
        if self._left > 0:
            return
        for mark in self._marks:
            with contextlib.suppress(FileExistsError):
                mark.touch(exist_ok=False)
                self._act()
                return

    def _act(self) -> None:
        if self._action == "sleep":
            sleep_for_long()
        elif self._action == "raise":
            raise ValueError("this rank's own mistake")
        elif self._action == "exit":
            os._exit(3)
        else:
            os.kill(os.getpid(), getattr(signal, self._action))
            time.sleep(60.0)  # a signal that stops arrives a moment later


def sleep_for_long() -> None:
    """Be alive, and do not finish."""
    time.sleep(600.0)


@contextlib.contextmanager
def driven(mesh: DeviceMesh, **options: Any) -> Iterator[Driver]:
    """Give the driver of ranks on the processor that start quickly."""
    os.environ["OMP_NUM_THREADS"] = "1"
    megatrain.initialize(
        mode="driver",
        global_device_mesh=mesh,
        platform="cpu",
        **({"fork_ranks": True, "connect_timeout_s": 120.0} | options),
    )
    try:
        yield driver_of()
    finally:
        megatrain.shutdown()


def driver_of() -> Driver:
    """Return the driver of this process."""
    from megatrain.api.session import current_remote

    remote = current_remote()
    assert remote is not None
    return remote.driver(None)


def make_model(checkpoint: Path, fault: dict[str, Any] | None = None) -> Any:
    """Return a model with an adapter, an optimizer and a schedule, and a fault to come."""
    model = megatrain.MegatronModel(str(checkpoint), mixed_precision="no")
    if fault is not None:
        model.apply_patch("tests.multiprocess.bus_tasks:Fault", **fault)
    model.add_adapter_to_model("default", LORA)
    model.set_optimizer("AdamW", lr=1e-2)
    model.set_lr_scheduler("CosineWarmupScheduler", num_warmup_steps=2, num_training_steps=20)
    return model


def train(model: Any, folder: Path, steps: int = 4, first: int = 0) -> dict[str, Any]:
    """Train, save and look at everything; return all that must be the same without a fault."""
    result: dict[str, Any] = {"losses": [], "logps": [], "metrics": []}
    for step in range(first, first + steps):
        batch = random_batch(6, seed=step, longest=20)
        output = model.forward_backward(inputs=batch)
        result["losses"].append(output.loss)
        result["logps"].append([row.tolist() for row in output.logps])
        model.clip_grad_and_step(max_grad_norm=1.0)
        if step == first + 1:
            model.save("checkpoint", output_dir=str(folder))
            result["seen"] = model.forward_only(inputs=batch).loss
        metrics = model.calculate_metric()
        metrics.pop("tokens_per_second", None)
        metrics.pop("mfu", None)
        result["metrics"].append(metrics)
    result["state"] = model.get_state_dict()
    return result


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two results are equal bit for bit."""
    states = one["state"], other["state"]
    return (
        {k: v for k, v in one.items() if k != "state"}
        == {k: v for k, v in other.items() if k != "state"}
        and states[0].keys() == states[1].keys()
        and all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    )


def is_locked(folder: Path) -> bool:
    """Tell whether a driver has the journal in a folder open."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


NAMED_S = 5.0
"""Seconds within which a loss is named."""


def losses_of(driver: Any) -> list[Event]:
    """Return a list that each loss is added to."""
    found: list[Event] = []
    driver.observers.add(lambda event: found.append(event) if event.kind == "lost" else None)
    return found
