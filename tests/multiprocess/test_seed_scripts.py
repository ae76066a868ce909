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


MESH = "from_sizes(fsdp_size=2, dp_size=2)"
"""The torchrun script's, on four ranks."""


def workplace(folder: Path, script: str, num_ranks: int) -> Path:
    """Make what a script looks for, 640 rows among it, and return its copy."""
    make_small_model(folder / "models" / "dense")
    rows = (ROOT / "examples" / "data" / "self_cognition.jsonl").read_text().splitlines()
    data = folder / "examples" / "data"
    data.mkdir(parents=True)
    (data / "self_cognition.jsonl").write_text("\n".join((rows * 10)[:640]) + "\n")
    text = (SCRIPTS / script).read_text()
    if num_ranks == 1:
        text = text.replace(MESH, "from_sizes(fsdp_size=1, dp_size=1)")
    copy = folder / script
    copy.write_text(text)
    return copy


def run(script: str, num_ranks: int, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a script's copy in its folder, on ranks of torchrun's if there are several."""
    copy = workplace(folder, script, num_ranks)
    start = [sys.executable]
    if num_ranks > 1:
        start = [*TORCHRUN, "--local-addr=127.0.0.1", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [*start, str(copy)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_the_script_that_only_reads_data_prints_a_batch_of_packed_rows(num_ranks, tmp_path):
    """Every rank prints the same batch."""
    said = run("partial.py", num_ranks, tmp_path).stdout
    rows = re.findall(r"Row\(key='(\w+)', num_tokens=(\d+)", said)
    assert len(rows) == 8 * num_ranks
    assert len(set(rows)) == 8
    assert all(400 < int(tokens) <= 512 for _, tokens in rows)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("script", "num_ranks"),
    [("single_device.py", 1), ("single_device.py", 4), ("torchrun.py", 1), ("torchrun.py", 4)],
)
def test_a_script_of_the_quick_start_runs_and_its_loss_falls(script, num_ranks, tmp_path):
    done = run(script, num_ranks, tmp_path)
    pattern = r"Current is step (\d+) of 80, metric: \{.*?'loss': ([\d.]+)"
    losses = {int(step): float(loss) for step, loss in re.findall(pattern, done.stderr)}
    assert list(losses) == [0, 20, 40, 60]
    assert losses[60] < losses[40] < losses[20]  # means over 20 batches each
    assert (tmp_path / "output" / "last-checkpoint" / "adapter_model.safetensors").is_file()
