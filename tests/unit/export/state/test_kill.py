"""Killed in the middle of saving, the checkpoint before is there and whole."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.export.state.retention import latest_state, verify_state

SCRIPT = Path(__file__).with_name("kill_tasks.py")
ROOT = Path(__file__).parents[4]


@pytest.mark.slow
def test_whenever_it_is_killed_the_last_complete_checkpoint_loads(tmp_path):
    rng = random.Random(0)
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        )
        with process:
            begun = [process.stdout.readline() for _ in range(3)]
            time.sleep(rng.uniform(0.0, 0.05))
            process.kill()
            begun += process.stdout.read().split()
        assert process.returncode == -9
        state = verify_state(folder / "last")
        assert latest_state(folder) == folder / "last"
        assert int(begun[-1]) - 1 <= state.step <= int(begun[-1])
        for kind in state.tensors:
            source = SafetensorsFolder(folder / "last" / "state" / kind)
            assert len(source) == 10
            assert all(torch.all(value == state.step) for value in source.values())
    assert list(tmp_path.glob("*/.last.*.partial")), "no kill came while a save was under way"
