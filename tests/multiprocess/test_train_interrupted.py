"""Runs that stop, by a signal or a limit, go on where they were; or say why they cannot."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatrain.cli.train.history import read_lines
from megatrain.export.state.record import has_state, read_record
from megatrain.export.state.retention import latest_state
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess.train_settings import (
    CP2_DP2,
    TP2_PP2,
    command,
    lines_of,
    settings,
    write_config,
)
from tests.multiprocess.train_tasks import train, train_error

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize(
    ("first", "second"), [(TP2_PP2, DeviceMesh()), (DeviceMesh(), CP2_DP2)], ids=str
)
def test_a_run_goes_on_from_another_layout_as_if_it_had_never_stopped(
    first, second, base, data, tmp_path, ranks
):
    """Within 1e-5: the layouts' sums of float32 numbers differ in their order."""
    straight, stopped = (
        settings(base, data / "chats.jsonl", tmp_path / name) for name in ("straight", "stopped")
    )
    options = ["optimizer.lr=1e-4", "train.max_steps=6", "train.gradient_accumulation_steps=2"]
    ranks.run(train, DeviceMesh(), straight, options)
    ranks.run(train, first, stopped, [*options, "train.max_steps=3"])
    ranks.run(train, second, stopped, [*options, "train.resume=auto"])
    np.testing.assert_allclose(
        lines_of(tmp_path / "stopped"), lines_of(tmp_path / "straight"), rtol=0, atol=1e-5
    )
    assert lines_of(tmp_path / "stopped", "step") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.seed=7", "made with seed=42, and this loader has 7"),
        ("train.shuffle=false", "made with shuffle=True, and this loader has False"),
        ("data.train.0.data_slice=[0, 16]", "other data: num_samples=24, and this loader has 16"),
    ],
)
def test_a_run_does_not_go_on_in_another_order_or_on_other_data(
    change, message, base, data, tmp_path, ranks
):
    values = settings(base, data / "chats.jsonl", tmp_path)
    ranks.run(train, DeviceMesh(), values, ["train.max_steps=2"])
    more = ["train.max_steps=4", "train.resume=auto", change]
    kinds, text = ranks.run(train_error, DeviceMesh(), values, more)[0]
    assert "ConfigError" in kinds
    assert message in text
    assert "train.other_data = true" in text
    ranks.run(train, DeviceMesh(), values, [*more, "train.other_data=true"])
    assert lines_of(tmp_path, "step") == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_saves_and_ends_and_the_run_goes_on(base, data, tmp_path):
    out = tmp_path / "out"
    config = write_config(settings(base, data / "chats.jsonl", out), tmp_path / "run.toml")
    options = ["--nproc", "2"]
    running = subprocess.Popen(command(config, *options, "--set", "train.max_steps=100000"))
    try:
        wait_for_lines(out, 3)
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) == 143
    finally:
        running.kill()
    done = len(lines_of(out))
    assert done >= 3
    assert (out / "last" / "adapter_model.safetensors").is_file()
    more = [*options, "--set", f"train.max_steps={done + 2}", "--set", "train.resume=auto"]
    subprocess.run(command(config, *more), check=True)
    assert lines_of(out, "step") == list(range(1, done + 3))
    assert (out / "loss.png").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_to_torchrun_leaves_a_complete_checkpoint(base, data, tmp_path):
    """The launcher hands the signal on; both ranks save the step in hand together."""
    out = tmp_path / "out"
    config = write_config(settings(base, data / "chats.jsonl", out), tmp_path / "run.toml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr=127.0.0.1", "--nproc-per-node", "2", "-m", "megatrain", "train"]
    running = subprocess.Popen([*torchrun, str(config), "--set", "train.max_steps=100000"])
    try:
        wait_for_lines(out, 3)
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) != 0
    finally:
        running.kill()
    done = len(lines_of(out))
    assert done >= 3
    assert latest_state(out) == out / "last"  # every file of it is whole
    assert read_record(out / "last").step == done
    more = ["--set", f"train.max_steps={done + 2}", "--set", "train.resume=auto"]
    subprocess.run(command(config, *more), check=True)
    assert lines_of(out, "step") == list(range(1, done + 3))


def wait_for_lines(out: Path, count: int) -> None:
    """Wait until a run has told of so many steps."""
    deadline = time.monotonic() + 300
    while len(read_lines(out / "metrics.jsonl")) < count:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.2)


def written_now(out: Path) -> list[Path]:
    """Return folders of checkpoints that are being written."""
    return [path for path in out.glob(".*.partial") if path.is_dir()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("nproc", ["1", "2"])
def test_a_run_killed_in_the_middle_of_a_save_goes_on_from_the_checkpoint_before(
    nproc, base, data, tmp_path
):
    out = tmp_path / "out"
    config = write_config(settings(base, data / "chats.jsonl", out), tmp_path / "run.toml")
    options = ["--nproc", nproc, "--set", "train.max_steps=100000", "--set", "train.save_every=1"]
    running = subprocess.Popen(command(config, *options), start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and running.poll() is None:
            if len(lines_of(out)) > 3 and written_now(out):
                os.killpg(running.pid, signal.SIGSTOP)  # nothing moves while we look
                if written_now(out):
                    break
                os.killpg(running.pid, signal.SIGCONT)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert written_now(out)  # it died while it was writing
    last = latest_state(out)  # every file of it is whole
    assert last is not None
    done = int(last.name.removeprefix("checkpoint-"))
    more = ["--nproc", nproc, "--set", f"train.max_steps={done + 2}", "--set", "train.resume=auto"]
    subprocess.run(command(config, *more), check=True)
    assert lines_of(out, "step") == list(range(1, done + 3))
    assert has_state(out / "last")
