"""A service of the benchmark's own: `megatrain serve` on a random checkpoint."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from megatrain.cli.quickstart.child import ChildFailedError

NAME = "bench/model"
START_S = 300.0
STOP_S = 60.0


class Served:
    """A service that ends with the block that it is used in."""

    def __init__(self, checkpoint: Path, folder: Path, options: Sequence[str]) -> None:
        """`folder` gets its data and its log; `options` are those of `megatrain serve`."""
        self._log = folder / "serve.log"
        command = [sys.executable, "-m", "megatrain", "serve", "--model", str(checkpoint)]
        command += ["--name", NAME, "--port", "0", "--data", str(folder / "data")]
        command += ["--sampler", "none", *options]
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=dict(os.environ)
            )

    def __enter__(self) -> "Served":
        """Wait until it is ready.  Raises ChildFailedError."""
        limit = time.monotonic() + START_S
        while not self._is_ready():
            if self._child.poll() is not None or time.monotonic() > limit:
                self.__exit__()
                said = self._log.read_text()[-4000:]
                raise ChildFailedError(f"the service did not start:\n{said}")
            time.sleep(0.1)
        return self

    def _is_ready(self) -> bool:
        found = re.search(r" at (http://\S+)\nAPI key: (\S+)", self._log.read_text())
        if found is None:
            return False
        self.url, self.key = found.groups()
        return httpx.get(f"{self.url}/readyz").status_code == httpx.codes.OK

    def __exit__(self, *error: object) -> None:
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
