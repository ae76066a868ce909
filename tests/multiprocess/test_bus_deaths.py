"""The death of a driver, of torchrun's ranks, and Ctrl-C: who is left, and who goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import megatrain
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess.bus_tasks import (
    EP2_DP2,
    NAMED_S,
    driven,
    driver_of,
    is_locked,
    losses_of,
    make_model,
)
from tests.multiprocess.data import random_batch

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints("qwen3_moe")


SCRIPT = """
import json, sys, time
from pathlib import Path
import megatrain
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess.bus_tasks import driver_of, make_model
from tests.multiprocess.data import random_batch

options = json.loads(sys.argv[1])
if "recovery" in options:
    options["recovery"] = megatrain.RecoveryPolicy(**options["recovery"])
if "global_device_mesh" in options:
    options["global_device_mesh"] = DeviceMesh(**options["global_device_mesh"])
megatrain.initialize(mode="driver", platform="cpu", **options)
model = make_model(Path(sys.argv[2]))
for step in range(2):
    model.forward_backward(inputs=random_batch(6, seed=step, longest=20))
    model.clip_grad_and_step(max_grad_norm=1.0)
    model.forward_only(inputs=random_batch(2, longest=20))
future = model.forward_backward_async(inputs=random_batch(6, seed=2, longest=20))
print(json.dumps(driver_of().welcome.pids), flush=True)
time.sleep(600)
"""


def killed_driver(options: dict[str, Any], checkpoint: Path) -> list[int]:
    """Run a script that drives ranks until it is killed; return the ranks' process ids."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(options), str(checkpoint)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([".", "bridges", "kernels"]),
    }
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=os.getcwd()
    ) as script:
        assert script.stdout is not None
        line = script.stdout.readline()
        script.kill()
    assert line, "the script failed"
    pids: list[int] = json.loads(line)
    return pids


def go_on(checkpoint: Path) -> Any:
    """Return what a driver with the journal of another one trains from there on."""
    for future in driver_of().undone.values():
        future.result(120)
    model = megatrain.MegatronModel(str(checkpoint), mixed_precision="no")
    assert model.adapter_names == ["default"]
    model.clip_grad_and_step(max_grad_norm=1.0)
    output = model.forward_backward(inputs=random_batch(6, seed=3, longest=20))
    return output.loss, output.logps[1].tolist(), model.get_state_dict()


def without_death(checkpoint: Path, mesh: DeviceMesh) -> Any:
    """Return what a driver that lives comes to."""
    with driven(mesh):
        model = make_model(checkpoint)
        for step in range(3):
            model.forward_backward(inputs=random_batch(6, seed=step, longest=20))
            model.clip_grad_and_step(max_grad_norm=1.0)
        output = model.forward_backward(inputs=random_batch(6, seed=3, longest=20))
        return output.loss, output.logps[1].tolist(), model.get_state_dict()


def check_same(one: Any, other: Any) -> None:
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    assert all((one[2][name] == other[2][name]).all() for name in one[2])


def all_gone(pids: list[int], timeout_s: float) -> bool:
    """Tell whether processes end in time by themselves."""
    limit = time.monotonic() + timeout_s
    while any(psutil.pid_exists(pid) for pid in pids):
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("snapshots", [pytest.param(False, marks=pytest.mark.chaos), True])
@pytest.mark.slow
def test_after_a_drivers_death_its_ranks_end_and_a_new_one_goes_on(
    checkpoint: Path, tmp_path: Path, snapshots: bool
) -> None:
    mesh = EP2_DP2
    options: dict[str, Any] = {"journal": str(tmp_path / "journal")}
    if snapshots:
        options["recovery"] = {"snapshot_every_commands": 3}
    ours = options | {"global_device_mesh": mesh.to_dict(), "fork_ranks": True}
    pids = killed_driver(ours, checkpoint)
    assert all_gone(pids, 10.0)
    assert not is_locked(tmp_path / "journal")
    recovery = megatrain.RecoveryPolicy(**options.pop("recovery", {}))
    with driven(mesh, journal=tmp_path / "journal", recovery=recovery) as driver:
        assert len(driver.undone) <= 1  # its reply may have come
        found = go_on(checkpoint)
    check_same(found, without_death(checkpoint, mesh))


@contextlib.contextmanager
def torchrun(folder: Path, *options: str) -> Iterator[str]:
    """Give the address of two ranks of `megatrain worker` that torchrun starts, and again."""
    address = f"unix:{folder}/worker.socket"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--max-restarts=3", "--monitor-interval=0.1", "--standalone"]
    command += ["-m", "megatrain", "worker", "--listen", address, "--platform", "cpu", *options]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([".", "bridges", "kernels"]),
    }
    with (folder / "torchrun.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            yield address
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.slow
def test_ranks_of_torchrun_survive_their_drivers_death_and_their_own(
    checkpoint: Path, tmp_path: Path
) -> None:
    with torchrun(tmp_path, "--ep", "2") as address:
        options: dict[str, Any] = {"address": address, "journal": str(tmp_path / "journal")}
        pids = killed_driver(options, checkpoint)
        assert all(psutil.pid_exists(pid) for pid in pids)
        megatrain.initialize(mode="driver", **options)
        try:
            driver = driver_of()
            assert driver.welcome.pids == pids  # the same ranks, which know what they knew
            assert len(driver.undone) <= 1
            losses = losses_of(driver)
            start = time.time()
            os.kill(pids[1], signal.SIGKILL)
            found = go_on(checkpoint)
            assert len(losses) == 1
            assert losses[0].at - start < NAMED_S
            assert driver.welcome.pids != pids
        finally:
            megatrain.shutdown()
        with driven_at(address) as driver:  # another session: the ranks forget
            assert driver.inspect()["models"] == {}
    check_same(found, without_death(checkpoint, EP2_DP2))


@contextlib.contextmanager
def driven_at(address: str) -> Iterator[Any]:
    megatrain.initialize(mode="driver", address=address)
    try:
        yield driver_of()
    finally:
        megatrain.shutdown()


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(checkpoint: Path) -> None:
    options = {"global_device_mesh": EP2_DP2.to_dict(), "fork_ranks": True}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(options), str(checkpoint)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([".", "bridges", "kernels"]),
    }
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as script:
        assert script.stdout is not None
        line = script.stdout.readline()
        children = [each.pid for each in psutil.Process(script.pid).children(recursive=True)]
        start = time.monotonic()
        script.send_signal(signal.SIGINT)
        script.wait(30)
        assert time.monotonic() - start < 10.0
    assert script.returncode == -signal.SIGINT
    assert all_gone([*json.loads(line), *children], 5.0)
