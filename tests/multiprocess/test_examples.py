"""Every example runs exactly as it is printed at the head of its file, and learns."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatrain.cli.train.history import read_lines

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(
    [path for path in (ROOT / "examples").glob("[0-9]*") if path.is_file()]
    + list((ROOT / "examples").glob("[0-9]*/train.toml"))
)
README = (ROOT / "examples" / "README.md").read_text()


def commands(example: Path) -> str:
    """Return what is indented at the head of an example: its commands."""
    text = example.read_text()
    if example.suffix == ".py":
        head = ast.get_docstring(ast.parse(text), clean=False) or ""
    else:
        head = "\n".join(
            line.removeprefix("#").removeprefix(" ") for line in text.split("\n\n")[0].splitlines()
        )
    return "\n".join(line.strip() for line in head.splitlines() if line.startswith("    "))


def run(script: str, folder: Path) -> str:
    """Run shell commands in a folder, with this environment's Python first."""
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples and the models that they train, made as the README says."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (first,) = re.findall(r"```bash\n(python .*)\n```", README)
    run(first, folder)
    return folder


def test_the_readme_lists_every_example_with_its_command():
    for example in EXAMPLES:
        assert f"]({example.relative_to(ROOT / 'examples')})" in README
        lines = commands(example).splitlines()
        assert lines, example
        assert len(lines) > 1 or f"`{lines[0]}`" in README


def test_data_files_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "examples/data").iterdir()}
    assert max(sizes.values()) < 50_000, sizes


@pytest.mark.timeout(600)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_example_runs_as_printed_and_learns(example, folder):
    said = run(commands(example), folder)
    if example.suffix == ".py":
        losses = [float(number) for number in re.findall(r"loss ([\d.]+)", said)]
        assert losses[-1] < 0.9 * losses[0]
        return
    number = re.match(r"\d+", str(example.relative_to(ROOT / "examples")))[0]
    lines = [
        line for line in read_lines(folder / f"output/{number}/metrics.jsonl") if "loss" in line
    ]
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    if "rewards/margins" in lines[0]:
        assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"] + 1
    if number == "11":
        assert lines[-1]["accuracy"] > lines[0]["accuracy"]
        assert lines[-1]["accuracy"] == 1.0
    assert (folder / f"output/{number}/loss.png").is_file()
    assert (folder / f"output/{number}/last").is_dir()
