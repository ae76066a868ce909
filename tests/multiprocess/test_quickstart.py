"""The main job as a user runs it: one command, from nothing to a verified adapter."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.mark.parametrize("options", [[], ["--moe", "--ep", "2"]], ids=["dense", "experts"])
@pytest.mark.timeout(900)
def test_quickstart_trains_exports_and_verifies(options, tmp_path):
    command = [sys.executable, "-m", "megatrain", "quickstart", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    for name in (
        "base/config.json",
        "adapter/adapter_model.safetensors",
        "metrics.jsonl",
        "loss.png",
    ):
        assert (out / name).is_file(), name
    report = json.loads((out / "report.json").read_text())
    # The base has never seen the task; a fall to under a fifth is seen, a half is asked for.
    assert report["loss_last"] < 0.5 * report["loss_first"]
    # Float32: sums in another order differ by 1e-6.
    assert report["max_logprob_difference"] <= 1e-5
    assert report["correct_after"] > report["correct_before"]
    assert report["tokens_per_second"] > 0
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == report["steps"]


@pytest.mark.timeout(600)
def test_quickstart_fails_when_the_loss_did_not_fall_and_keeps_the_base(tmp_path):
    command = [sys.executable, "-m", "megatrain", "quickstart", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--steps", "1", "--tp", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "loss" in done.stderr
    assert (tmp_path / "out" / "base" / "config.json").is_file()
