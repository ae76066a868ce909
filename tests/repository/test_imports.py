"""Importing is cheap: the half that needs no torch does not get it, and help is quick."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "megatron", "transformers", "peft", "numpy", "matplotlib", "rich")
LIGHT = (
    "megatrain",
    "megatrain.cli",
    "megatrain.cli.doctor",
    "megatrain.errors",
    "megatrain.log",
    "megatrain.parallel.layout",
    "megatrain.platforms.nvidia",
    "megatrain.platforms.packages",
)
NO_TORCH = ("megatrain.api", "megatrain.config", "megatrain.types")
HEAVY_STANDARD = ("asyncio", "ctypes", "multiprocessing", "sqlite3", "unittest")
HELP_LIMIT_S = 0.5


def _imported_by(module: str, suspects: tuple[str, ...]) -> list[str]:
    code = f"import sys, {module}\nprint(*[name for name in {suspects!r} if name in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return answer.stdout.split()


@pytest.mark.parametrize("module", LIGHT)
def test_the_light_half_imports_nothing_heavy(module: str) -> None:
    assert _imported_by(module, HEAVY) == []


@pytest.mark.parametrize("module", NO_TORCH)
def test_configuration_types_and_api_need_no_torch(module: str) -> None:
    assert _imported_by(module, ("torch", "megatron", "transformers", "peft")) == []


HELP = """
import contextlib, io, sys, time
before, text = {*sys.modules}, io.StringIO()
from megatrain.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
    main(["--help"])
assert "doctor" in text.getvalue()
print(time.process_time(), *{name.partition(".")[0] for name in {*sys.modules} - before})
"""


def _help() -> tuple[float, set[str]]:
    """Return processor time of `megatrain --help`, Python's start included, and what it imports."""
    command = [sys.executable, "-c", HELP]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, *packages = answer.stdout.split()
    return float(seconds), set(packages)


def test_help_imports_nothing_from_outside_the_standard_library() -> None:
    _, packages = _help()
    ours = {"megatrain", "megatrain_bridges", "megatrain_kernels"}
    assert packages - sys.stdlib_module_names <= ours
    assert not packages & set(HEAVY_STANDARD)


def test_help_takes_less_than_half_a_second_of_processor_time() -> None:
    # Not of the clock's: other processes share these cores.
    assert min(_help()[0] for _ in range(3)) < HELP_LIMIT_S
