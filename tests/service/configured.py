"""A service with a configuration of its own, where the command's options do not reach."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.service.server import NAME, Server


class ConfiguredServer(Server):
    """`megatrain serve --config` with a tiny model on processors."""

    def __init__(self, model: Path, folder: Path, *, served: dict[str, Any], **fields: Any) -> None:
        """`served`: fields of ServedModel; `fields`: of ServiceConfig."""
        super().__init__(model, folder)
        base = {
            "name": NAME,
            "path": str(model),
            "platform": "cpu",
            "options": {"mixed_precision": "no"},
            "bus": {"fork_ranks": True},
        }
        self._fields = {**fields, "models": [base | served]}

    @property
    def pid(self) -> int:
        """Of the service itself."""
        assert self._process is not None
        return self._process.pid

    def arguments(self) -> list[str]:
        """Return the option that names a file of all of it."""
        config = self.folder / "service.toml"
        config.write_text("".join(f"{key} = {_toml(self._fields[key])}\n" for key in self._fields))
        return ["--config", str(config)]

    def create_key(self, *options: str) -> str:
        """Return a new key, made by the command in the database that is configured."""
        command = [sys.executable, "-m", "megatrain", "keys", "--data", str(self.folder / "data")]
        if "database" in self._fields:
            command += ["--database", self._fields["database"]]
        done = subprocess.run(
            [*command, "create", *options], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def descendants(self, word: str) -> list[int]:
        """Return the processes below the service whose command line has a word, parents first."""
        parents: dict[int, list[int]] = {}
        for each in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(each.name))
        found, left = [], [self.pid]
        while left:
            left += (children := sorted(parents.get(left.pop(0), [])))
            found += [pid for pid in children if word in _command_line(pid)]
        return found


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def kill(pid: int) -> None:
    """End a process as a lost machine would."""
    os.kill(pid, signal.SIGKILL)


def _toml(value: Any) -> str:
    """Return a value as TOML writes it within a line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
