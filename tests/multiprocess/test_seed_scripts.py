"""The quick start's scripts, with only imports, model class and paths changed, on 1 and 4 ranks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.small_model import make_small_model

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "fixtures" / "seed_scripts"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("script", "num_ranks"),
    [("single_device.py", 1), ("single_device.py", 4), ("torchrun.py", 4)],
)
def test_a_script_of_the_quick_start_runs(script, num_ranks, tmp_path):
    make_small_model(tmp_path / "models" / "dense")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    start = [sys.executable]
    if num_ranks > 1:
        start = [*TORCHRUN, "--local-addr=127.0.0.1", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [*start, str(SCRIPTS / script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"Current is step 0 of 8, metric: \{.*'loss': [\d.]+", done.stderr)
    assert (tmp_path / "output" / "last-checkpoint" / "adapter_model.safetensors").is_file()
