"""Environments with tinker-cookbook, of its own process and packages, made once and kept.

Nothing of this project is in them: recipes run as their users run them.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

VERSIONS = ("0.6.1", "0.5.8")
CACHE = Path(os.environ.get("MEGATRAIN_TEST_CACHE", "~/.cache/megatrain-tests")).expanduser()
HERE = Path(__file__).parent


def cookbook_python(version: str) -> Path:
    """Return the Python of an environment with this version of the cookbook, made if absent."""
    requirements = HERE / f"cookbook-{version}.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = CACHE / f"cookbook-{version}-{digest}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            _make(folder, requirements)
    return folder / "bin" / "python"


def _make(folder: Path, requirements: Path) -> None:
    uv = _uv()
    shutil.rmtree(folder, ignore_errors=True)
    _run([*uv, "venv", "--quiet", "--python", sys.executable, str(folder)])
    # Without dependencies: the list is frozen, and renderers that few models need are in no index.
    install = [
        *uv,
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--python",
        str(folder / "bin/python"),
    ]
    _run([*install, "--requirement", str(requirements)])
    (folder / "complete").touch()


def _uv() -> list[str]:
    for command in (["uv"], [sys.executable, "-m", "uv"], ["python3", "-m", "uv"]):
        found = shutil.which(command[0])
        if found and not subprocess.run([*command, "--version"], capture_output=True).returncode:
            return command
    raise RuntimeError("uv is not there: pip install uv")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
