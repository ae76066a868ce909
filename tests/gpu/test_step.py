"""A whole training step on CUDA against the same step on the CPU, both in float32."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("gpu_step.py")


def run_step(folder, platform, out):
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bridges")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), str(folder), platform, str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NVIDIA_TF32_OVERRIDE": "0"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss"])
def test_a_step_on_cuda_is_that_of_the_cpu(family, checkpoints, tmp_path):
    cpu, cuda = (
        run_step(checkpoints(family), platform, tmp_path / platform) for platform in ("cpu", "cuda")
    )
    for a, b in zip(cuda["logps"], cpu["logps"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for name, expected in cpu["gradient"].items():
        error = (cuda["gradient"][name] - expected).abs().max() / expected.abs().max()
        assert error <= 1e-3, name
