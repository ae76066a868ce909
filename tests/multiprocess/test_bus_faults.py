"""Ranks and drivers are killed, stopped and stuck at every phase; nothing is lost, all is named.

Every rank at every phase is under the marker `chaos`; a seeded sample of it always runs.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import megatrain
from megatrain.bus.events import Event
from megatrain.errors import BusError, DeadlineError, RankError
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess.bus_tasks import (
    EP2_DP2,
    NAMED_S,
    PHASES,
    TP2_PP2,
    driven,
    losses_of,
    make_model,
    same,
    train,
)
from tests.multiprocess.data import random_batch

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

LAYOUTS = {"TP2·PP2": TP2_PP2, "EP2·DP2": EP2_DP2}
COUNTS = {"validating": 9, "forward": 3, "backward": 3, "optimizer step": 3, "gathering": 3}
"""The n-th time that a phase is entered, somewhere in the middle of the training."""


def ranks_in(layout: str, phase: str) -> list[int]:
    """Return the ranks that enter a phase: the loss is on the last stage of a pipeline."""
    if layout == "EP2·DP2":
        return [0, 1]
    return [2, 3] if phase == "backward" else [0, 1, 2, 3]


EVERY = [
    (layout, phase, rank)
    for layout in LAYOUTS
    for phase in ("idle", *PHASES)
    for rank in ranks_in(layout, phase)
]


def sample() -> set[tuple[str, str, int]]:
    """Return each phase once, under the layouts in turn, at a rank chosen at random; and rank 0."""
    order = random.Random(0)
    chosen = {("TP2·PP2", "forward", 0)}
    for number, phase in enumerate(("idle", *PHASES)):
        layout = list(LAYOUTS)[number % 2]
        chosen.add((layout, phase, order.choice(ranks_in(layout, phase))))
    return chosen


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints("qwen3_moe")


@pytest.fixture(scope="module")
def undisturbed(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[DeviceMesh], dict[str, Any]]:
    """Return a function that returns the result without a fault, computed once for a layout."""
    found: dict[DeviceMesh, dict[str, Any]] = {}

    def function(mesh: DeviceMesh) -> dict[str, Any]:
        if mesh not in found:
            with driven(mesh) as driver:
                folder = tmp_path_factory.mktemp("undisturbed")
                found[mesh] = train(make_model(checkpoint), folder)
                assert driver.losses == []
        return found[mesh]

    return function


STOPPED = (("idle", 1), ("forward", 0))
"""What of the stopped ranks always runs."""


def check_named(losses: list[Event], rank: int, since: float) -> None:
    """Check that one loss was heard of in time, and that it names the rank."""
    assert len(losses) == 1, [each.text for each in losses]
    assert losses[0].text.startswith(f"rank {rank} ("), losses[0].text
    assert losses[0].at - since < NAMED_S


@pytest.mark.parametrize(
    ("layout", "phase", "rank"),
    [pytest.param(*case, marks=() if case in sample() else pytest.mark.chaos) for case in EVERY],
)
@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_nothing_changes(
    checkpoint: Path,
    undisturbed: Callable[[DeviceMesh], dict[str, Any]],
    tmp_path: Path,
    layout: str,
    phase: str,
    rank: int,
) -> None:
    mesh = LAYOUTS[layout]
    wanted = undisturbed(mesh)
    marks = tmp_path / "marks"
    marks.mkdir()
    fault = {"folder": str(marks), "rank": rank, "at": phase, "count": COUNTS.get(phase, 1)}
    with driven(mesh) as driver:
        losses = losses_of(driver)
        model = make_model(checkpoint, None if phase == "idle" else fault)
        if phase == "idle":
            (marks / "idle").touch()
            os.kill(driver.welcome.pids[rank], signal.SIGKILL)
        found = train(model, tmp_path)
        assert driver.supervisor.num_restarts == 1
    (mark,) = marks.iterdir()
    check_named(losses, rank, mark.stat().st_mtime)
    assert "SIGKILL" in losses[0].text
    assert same(found, wanted)


@pytest.mark.parametrize(
    ("phase", "rank"),
    [
        pytest.param(phase, rank, marks=() if (phase, rank) in STOPPED else pytest.mark.chaos)
        for phase in ("idle", "forward")
        for rank in (0, 1, 3)
    ],
)
@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_nothing_changes(
    checkpoint: Path,
    undisturbed: Callable[[DeviceMesh], dict[str, Any]],
    tmp_path: Path,
    phase: str,
    rank: int,
) -> None:
    wanted = undisturbed(TP2_PP2)
    marks = tmp_path / "marks"
    marks.mkdir()
    fault = {"folder": str(marks), "rank": rank, "at": phase, "count": 5, "action": "SIGSTOP"}
    with driven(TP2_PP2) as driver:
        losses = losses_of(driver)
        model = make_model(checkpoint, None if phase == "idle" else fault)
        old = list(driver.welcome.pids)
        if phase == "idle":
            (marks / "idle").touch()
            os.kill(old[rank], signal.SIGSTOP)
        found = train(model, tmp_path)
        assert not any(psutil.pid_exists(pid) for pid in old)
    (mark,) = marks.iterdir()
    check_named(losses, rank, mark.stat().st_mtime)
    assert "has given no sign of life" in losses[0].text
    assert ", in " in losses[0].text or ", idle" in losses[0].text  # as it said last
    assert same(found, wanted)


@pytest.mark.slow
def test_a_rank_that_does_not_finish_is_a_deadline_error_with_its_stack(
    checkpoint: Path, tmp_path: Path
) -> None:
    fault = {"folder": str(tmp_path), "rank": 2, "at": "forward", "action": "sleep", "times": 2}
    with driven(TP2_PP2) as driver:
        model = make_model(checkpoint, fault)
        batch = random_batch(4, longest=20)
        start = time.monotonic()
        slow = model.forward_backward_async(inputs=batch, timeout_s=2.0)
        after = model.forward_backward_async(inputs=batch)
        with pytest.raises(DeadlineError, match=r"was not done within 2 s, 2 times") as error:
            slow.result(120)
        assert time.monotonic() - start < 30.0
        text = str(error.value)
        assert "rank 2" in text
        assert "sleep_for_long" in text  # the innermost frame, by its name
        assert after.result(120).loss > 0  # the next command is done
        assert len(driver.losses) == 2
        assert model.calculate_metric()["label_tokens"] > 0


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("exit", "exit status 3"),
        pytest.param("SIGKILL", "killed by SIGKILL", marks=pytest.mark.chaos),
    ],
)
def test_a_command_that_kills_ranks_is_given_up_and_the_next_ones_are_done(
    checkpoint: Path, tmp_path: Path, action: str, text: str
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    batches = [random_batch(4, seed=seed, longest=20) for seed in range(3)]
    with driven(EP2_DP2):
        model = make_model(checkpoint)
        for number in (0, 2):
            model.forward_backward(inputs=batches[number])
        wanted = model.get_gradients()
    fault = {"folder": str(marks), "rank": 1, "at": "forward", "count": 2, "action": action}
    with driven(EP2_DP2) as driver:
        model = make_model(checkpoint, fault | {"times": 2})
        futures = [model.forward_backward_async(inputs=each) for each in batches]
        assert futures[0].result(120).loss > 0
        with pytest.raises(RankError, match=r"ForwardBackward .* was given up.*2 times") as error:
            futures[1].result(120)
        assert text in str(error.value)
        assert futures[2].result(120).loss > 0
        assert len(driver.losses) == 2
        found = model.get_gradients()
    assert len(list(marks.iterdir())) == 2
    assert wanted.keys() == found.keys()
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_a_rank_that_fails_alone_is_named_with_its_error(checkpoint: Path, tmp_path: Path) -> None:
    fault = {"folder": str(tmp_path), "rank": 3, "at": "forward", "action": "raise", "times": 2}
    with driven(TP2_PP2):
        model = make_model(checkpoint, fault)
        with pytest.raises(RankError) as error:
            model.forward_backward(inputs=random_batch(4, longest=20))
        assert "rank 3" in str(error.value)
        assert "this rank's own mistake" in str(error.value)


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("forward", marks=pytest.mark.chaos),
        "saving",
        pytest.param("optimizer step", marks=pytest.mark.chaos),
    ],
)
def test_recovery_from_a_snapshot_is_exact(
    checkpoint: Path,
    undisturbed: Callable[[DeviceMesh], dict[str, Any]],
    tmp_path: Path,
    phase: str,
) -> None:
    wanted = undisturbed(EP2_DP2)
    marks = tmp_path / "marks"
    marks.mkdir()
    counts = {"forward": 4, "saving": 2, "optimizer step": 4}
    fault = {"folder": str(marks), "rank": 1, "at": phase, "count": counts[phase]}
    recovery = megatrain.RecoveryPolicy(snapshot_every_commands=3)
    events: list[str] = []
    with driven(EP2_DP2, recovery=recovery, journal=tmp_path / "journal") as driver:
        driver.observers.add(lambda event: events.append(event.kind))
        model = make_model(checkpoint, fault)
        wait_for_snapshot(driver)
        found = train(model, tmp_path / "out")
        wait_for_snapshot(driver)
    assert list(marks.iterdir())
    assert events.count("lost") == events.count("recovered") == 1
    assert events.count("snapshot") >= 2
    assert same(found, wanted)
    left = [each.name for each in (tmp_path / "journal").glob("snapshot-*")]
    assert len(left) == 1


def wait_for_snapshot(driver: Any) -> None:
    """Wait until a snapshot is whole."""
    limit = time.monotonic() + 20.0
    while driver.history.snapshot is None or driver.history._awaited is not None:
        assert time.monotonic() < limit, "no snapshot"
        time.sleep(0.05)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_in_the_background_survives_a_loss(
    checkpoint: Path, tmp_path: Path, rank: int
) -> None:
    saved: list[dict[str, bytes]] = []
    for is_lost in (False, True):
        folder = tmp_path / str(is_lost)
        with driven(EP2_DP2) as driver:
            model = make_model(checkpoint)
            batch = random_batch(6, longest=20)
            model.forward_backward(inputs=batch)
            model.clip_grad_and_step()
            model.save("one", output_dir=str(folder), save_optimizer=True, background=True)
            if is_lost:
                os.kill(driver.welcome.pids[rank], signal.SIGKILL)
            model.forward_backward(inputs=batch)
            model.wait_for_save()
            assert len(driver.losses) == is_lost
        files = sorted(each for each in (folder / "one").rglob("*") if each.is_file())
        saved.append({str(each.relative_to(folder)): each.read_bytes() for each in files})
    assert saved[0].keys() == saved[1].keys()
    weights = [name for name in saved[0] if name.endswith(".safetensors")]
    assert weights
    assert all(saved[0][name] == saved[1][name] for name in weights)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Give a file system of its own of this size."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_under_the_journal_refuses_commands_and_loses_none(
    checkpoint: Path, tmp_path: Path
) -> None:
    mesh, batch = DeviceMesh(dp=2), random_batch(30, longest=60)
    accepted = 0
    with (
        small_disk(tmp_path / "disk", "256k") as disk,
        driven(mesh, journal=disk / "journal") as driver,
    ):
        model = make_model(checkpoint)

        def fill() -> None:
            nonlocal accepted
            while True:
                model.forward_backward(inputs=batch)
                accepted += 1

        with pytest.raises(BusError, match=r"was not accepted(.|\n)*make room"):
            fill()
        assert 3 < accepted < 100
        assert model.forward_only(inputs=batch[1:3]).loss > 0  # which needs no room
        os.kill(driver.welcome.pids[1], signal.SIGKILL)
        found = model.get_gradients()  # ranks start again although the disk is full
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        model.clip_grad_and_step()
        assert model.calculate_metric()["step"] == 1.0
    with driven(mesh):
        model = make_model(checkpoint)
        for _ in range(accepted):
            model.forward_backward(inputs=batch)
        wanted = model.get_gradients()
    assert all((found[name] == wanted[name]).all() for name in wanted)
