"""What scripts do beside training: files that change, forks, callbacks, losses of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megatrain
from megatrain.api.session import current_remote
from megatrain.errors import BusError, ConfigError
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess.data import random_batch
from tests.multiprocess.tasks import make_model

pytestmark = pytest.mark.multiprocess
BATCH = random_batch(4, seed=1)[1:]


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    megatrain.initialize(
        mode="driver", global_device_mesh=DeviceMesh(tp=2), platform="cpu", fork_ranks=True
    )
    remote = current_remote()
    assert remote is not None
    yield remote.driver(None)
    megatrain.shutdown()


def train(model, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(model.forward_backward(inputs=BATCH).loss)
        model.clip_grad_and_step()
    return losses


def lose_a_rank(driver) -> None:
    os.kill(driver.welcome.pids[1], signal.SIGKILL)
    while not driver.losses:
        time.sleep(0.05)
    driver.ping()


def test_a_state_that_was_resumed_and_then_written_over_is_not_read_again(
    driver, checkpoints, tmp_path
):
    model = make_model(checkpoints("qwen3"))
    model.set_optimizer("AdamW", lr=1e-3)
    train(model, 1)
    path = model.save("latest", output_dir=str(tmp_path), save_optimizer=True)
    model.close()
    model = megatrain.MegatronModel(str(checkpoints("qwen3")), mixed_precision="no")
    assert model.resume_from_checkpoint(path)["cur_step"] == 1
    while driver.history.snapshot is None:  # one is taken at once
        time.sleep(0.05)
    train(model, 3)
    model.save("latest", output_dir=str(tmp_path), save_optimizer=True)
    expected = model.forward_only(inputs=BATCH).loss
    lose_a_rank(driver)
    assert model.forward_only(inputs=BATCH).loss == expected
    assert model.calculate_metric()["step"] == 4.0


def test_a_save_in_the_background_is_not_done_again_over_a_later_one(driver, checkpoints, tmp_path):
    model = make_model(checkpoints("qwen3"))
    model.set_optimizer("AdamW", lr=1e-3)
    train(model, 1)
    model.save("x", output_dir=str(tmp_path), background=True)
    model.wait_for_save()
    train(model, 1)
    model.save("x", output_dir=str(tmp_path))
    saved = (tmp_path / "x" / "adapter_model.safetensors").read_bytes()
    lose_a_rank(driver)
    model.wait_for_save()
    assert (tmp_path / "x" / "adapter_model.safetensors").read_bytes() == saved


def test_a_forked_child_leaves_the_ranks_alone(driver):
    child = os.fork()
    if not child:
        driver.close()
        os._exit(0)
    os.waitpid(child, 0)
    driver.ping()
    assert driver.losses == []


def test_callbacks_hold_up_neither_ranks_nor_other_futures(driver, checkpoints):
    model = make_model(checkpoints("qwen3"))
    slow = model.forward_backward_async(inputs=BATCH)
    slow.add_done_callback(lambda _: time.sleep(5))
    others: list[float] = []
    model.forward_backward_async(inputs=BATCH).add_done_callback(
        lambda _: others.append(model.forward_only(inputs=BATCH).loss)
    )
    for _ in range(5):
        train_began = time.monotonic()
        model.forward_only(inputs=BATCH)
        assert time.monotonic() - train_began < 3
    deadline = time.monotonic() + 20
    while not others and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(others) == 1
    assert driver.losses == []


def test_an_error_of_ones_own_may_say_anything(driver, checkpoints):
    model = make_model(checkpoints("qwen3"))
    model.set_loss("tests.multiprocess.test_bus_scripts:broken")
    with pytest.raises(BusError, match="boom"):
        model.forward_backward(inputs=BATCH)
    model.set_loss("CrossEntropyLoss")
    assert model.forward_backward(inputs=BATCH).loss > 0
    assert driver.losses == []


def broken(batch):
    raise ValueError("boom \udc80")


def test_what_has_no_name_elsewhere_is_refused(driver, checkpoints):
    model = make_model(checkpoints("qwen3"))
    for spec in (lambda batch: batch.logps_N.sum(), Thing().loss):
        with pytest.raises(ConfigError, match="the ranks are other processes"):
            model.set_loss(spec)


class Thing:
    def loss(self, batch):
        return batch.logps_N.sum()


SCRIPT = """
import sys
import megatrain
import losses_of_mine
megatrain.initialize(mode="driver", nproc_per_node=1, platform="cpu")
model = megatrain.MegatronModel(sys.argv[1], mixed_precision="no")
model.add_adapter_to_model("default", {"r": 2, "target_modules": "all-linear"})
model.set_loss(losses_of_mine.minus_logps)
print(model.forward_backward(inputs=[{"input_ids": [1, 2, 3, 4]}]).loss > 0)
megatrain.shutdown()
"""


@pytest.mark.slow
def test_ranks_import_what_stands_beside_the_script(checkpoints, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "losses_of_mine.py").write_text(
        "def minus_logps(batch):\n    return -batch.logps_N.sum()\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(checkpoints("qwen3"))],
        capture_output=True, text=True, check=False, cwd="/", timeout=200,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr[-3000:]
