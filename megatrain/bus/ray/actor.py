"""What runs on a node for one rank: it starts the rank's process, watches it and ends with it.

No torch: that is for the rank, whose environment is complete before its interpreter starts.
"""

import collections
import contextlib
import os
import shutil
import socket
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from megatrain.bus.rank_process import FreshProcess
from megatrain.parallel.environment import rank_environment

POLL_S = 0.1
KEPT_LINES = 200
"""Lines of the rank's output that are kept for an error."""
SAID_S = 1.0
"""Seconds to read what a rank that has ended said last."""
KILLED_S = 10.0
"""Seconds that the system gets to end a process that was killed."""


class RankActor:
    """A rank's actor.  Its methods take and return plain values only.

    Should it be killed itself, the rank's standard input closes, and the rank ends.
    """

    def __init__(self, label: str) -> None:
        """`label` comes before each line that the rank prints."""
        self._label = label
        self._folder = Path(tempfile.mkdtemp(prefix="megatrain-"))  # 0700
        self._process: FreshProcess | None = None
        self._output: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._reader = threading.Thread(target=self._pass_on, daemon=True)

    def place(self, stale: list[str]) -> dict[str, Any]:
        """Remove what actors that were killed have left here; return the fields of a Place."""
        import ray  # noqa: PLC0415 - an extra

        for folder in stale:
            shutil.rmtree(folder, ignore_errors=True)
        context = ray.get_runtime_context()
        return {
            "node": context.get_node_id(),
            "ip": ray.util.get_node_ip_address(),
            "folder": str(self._folder),
            "ports": _free_ports(),
            "devices": context.get_accelerator_ids(),
        }

    def start(self, variables: dict[str, str], cwd: str, token: bytes) -> int:
        """Start the rank; return its process id.  The token goes to the file `token`."""
        file = os.open(self._folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "wb") as opened:
            opened.write(token)
        _enter(cwd)
        environment = rank_environment(int(variables["LOCAL_WORLD_SIZE"])) | variables
        self._process = FreshProcess(environment | {"PYTHONPATH": _python_path()})
        self._reader.start()
        return self._process.pid

    def _pass_on(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ValueError), self._process.output:
            for raw in self._process.output:
                line = raw.decode(errors="replace").rstrip()
                self._output.append(line)
                sys.stderr.write(f"[{self._label}] {line}\n")

    def wait(self) -> tuple[int, str]:
        """Wait until the rank ends; return its exit status and its last lines."""
        assert self._process is not None
        while (status := self._process.poll()) is None:
            time.sleep(POLL_S)
        self._reader.join(SAID_S)  # a process that it left behind may keep the pipe open
        return status, "\n".join(list(self._output)[-30:])

    def end(self) -> None:
        """End the rank, and remove what it left."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(KILLED_S)
            self._process.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_ports() -> tuple[int, int]:
    """Return two ports on which nobody listens."""
    with socket.create_server(("", 0)) as first, socket.create_server(("", 0)) as second:
        return first.getsockname()[1], second.getsockname()[1]


def _enter(cwd: str) -> None:
    """Enter the driver's folder if there is one here, and no runtime environment has another."""
    import ray  # noqa: PLC0415 - an extra

    if not ray.get_runtime_context().runtime_env.has_working_dir() and Path(cwd).is_dir():
        os.chdir(cwd)


def _python_path() -> str:
    """Return what Ray has added to the path for the script and its runtime environment."""
    known = sysconfig.get_paths()
    installed = {Path(known[each]) for each in ("stdlib", "platstdlib", "purelib", "platlib")}
    added = [
        path
        for path in sys.path
        # Ray's own copies of packages are below the installed ones, too.
        if path and not installed & {Path(path), *Path(path).parents}
    ]
    return os.pathsep.join(added)
