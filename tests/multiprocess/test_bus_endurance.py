"""Many commands and many losses: the order is kept, nothing grows, nothing is lost."""

import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest

import megatrain
from megatrain.bus.commands import Ping, ZeroGrad
from megatrain.bus.driver import Driver
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess.bus_tasks import driven, make_model, same, train

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

COMMANDS, WARM = 10_000, 1_000
MIB = 1 << 20
SEEDS, BY_DEFAULT = 100, 5


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints("qwen3_moe")


def held(driver: Driver) -> dict[str, int]:
    """Return memory and files of the driver and its ranks."""
    found = {}
    for name, pid in [("driver", os.getpid()), *enumerate(driver.welcome.pids)]:
        process = psutil.Process(pid)
        found[f"{name} bytes"] = process.memory_info().rss
        found[f"{name} files"] = process.num_fds()
        found[f"{name} threads"] = process.num_threads()
    return found


@pytest.mark.slow
def test_ten_thousand_commands_keep_their_order_and_nothing_grows(checkpoint: Path) -> None:
    with driven(DeviceMesh(dp=2)) as driver:
        model = make_model(checkpoint)
        answered: list[int] = []
        before: dict[str, int] = {}
        futures: list[Future[Any]] = []
        for number in range(COMMANDS):
            command = Ping() if number % 2 else ZeroGrad(model=model._engine.key)
            future = driver.submit(command)
            future.add_done_callback(lambda _, number=number: answered.append(number))
            futures = [*futures[-300:], future]
            if number == WARM:
                future.result(60)
                before = held(driver)
        for future in futures:
            future.result(60)
        after = held(driver)
        assert answered == list(range(COMMANDS))
        assert driver.losses == []
        assert driver.num_pending == 0
        for name, value in after.items():
            room = 24 * MIB if name.endswith("bytes") else 2
            assert value - before[name] <= room, (name, before[name], value)
        said = driver.inspect()
        assert abs(said["files"] - after["0 files"]) <= 2
        assert said["resident_bytes"] > 0


def test_restarts_do_not_leave_files_threads_or_processes(checkpoint: Path) -> None:
    me = psutil.Process()
    recovery = megatrain.RecoveryPolicy(max_restarts=99)
    with driven(DeviceMesh(dp=2), recovery=recovery) as driver:
        for number in range(12):
            old = list(driver.welcome.pids)
            os.kill(old[number % 2], signal.SIGKILL)
            driver.ping()
            while len(driver.losses) <= number:
                time.sleep(0.02)
            driver.ping()
            assert not any(psutil.pid_exists(pid) for pid in old)
            if number == 2:
                files, threads = me.num_fds(), threading.active_count()
        assert me.num_fds() <= files + 2
        assert threading.active_count() <= threads + 2


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with driven(DeviceMesh(ep=2, dp=2)):
        return train(make_model(checkpoint), tmp_path_factory.mktemp("undisturbed"), steps=6)


@pytest.mark.parametrize(
    "seed",
    [pytest.param(n, marks=() if n < BY_DEFAULT else pytest.mark.chaos) for n in range(SEEDS)],
)
@pytest.mark.slow
def test_whatever_is_killed_and_when_nothing_is_lost(
    checkpoint: Path, undisturbed: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    """Ranks are killed, or the connection is cut, at moments that are chosen at random."""
    order = random.Random(seed)
    recovery = megatrain.RecoveryPolicy(
        max_restarts=99, max_attempts=9, snapshot_every_commands=order.choice([2, 5, 1000])
    )
    over = threading.Event()
    with driven(DeviceMesh(ep=2, dp=2), recovery=recovery) as driver:

        def disturb() -> None:
            for _ in range(order.randint(1, 4)):
                if over.wait(order.uniform(0.0, 1.5)):
                    return
                pid = order.choice(driver.welcome.pids)
                what = order.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGSEGV", "cut"])
                if what == "cut":
                    driver.link.close()
                elif psutil.pid_exists(pid):
                    os.kill(pid, getattr(signal, what))

        thread = threading.Thread(target=disturb)
        thread.start()
        found = train(make_model(checkpoint), tmp_path, steps=6)
        over.set()
        thread.join()
        losses = list(driver.losses)
    assert same(found, undisturbed), losses


def test_an_empty_command_costs_little_on_eight_ranks(record_property: Any) -> None:
    with driven(DeviceMesh(dp=8)) as driver:
        for _ in range(20):
            driver.ping()
        seconds = sorted(driver.ping() for _ in range(200))
    median = statistics.median(seconds)
    record_property("median_s", median)
    print(f"median {median * 1e3:.2f} ms, p95 {seconds[190] * 1e3:.2f} ms")
    assert median < 0.25
