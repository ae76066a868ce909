"""A service of its own process for tests: started, killed, started again on the same folder."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.service.sdk_clients import close_clients

NAME = "tiny/base"
START_S = 180.0


class Server:
    """`megatrain serve` with a tiny model on one or more processors."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self.folder, self._model, self._options = folder, model, options
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What it has printed."""
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def arguments(self) -> list[str]:
        """Return what it serves, as options of the command."""
        what = ["--model", str(self._model), "--name", NAME, "--mixed-precision", "no"]
        return [*what, "--platform", "cpu", "--fork-ranks", *self._options]

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.log.count(" ready")
        command = [sys.executable, "-m", "megatrain", "serve", *self.arguments()]
        command += ["--port", str(self.port), "--data", str(self.folder / "data")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=dict(os.environ)
            )
        limit = time.monotonic() + START_S
        while self.log.count(" ready") == before:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < limit, self.log
            time.sleep(0.1)
        found = re.findall(r"API key: (tml-\S+)", self.log)
        self.key = found[0] if found else ""

    def kill(self) -> None:
        """End it as a lost machine would."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        """Close this process' clients, and ask it to end; return its exit status."""
        assert self._process is not None
        close_clients()
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def create_key(self, *options: str) -> str:
        """Return a new key, made by the command."""
        command = [sys.executable, "-m", "megatrain", "keys", "--data", str(self.folder / "data")]
        done = subprocess.run(
            [*command, "create", *options], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def http(self, key: str | None = None) -> httpx.Client:
        """Return a client of the API."""
        headers = {"X-API-Key": self.key if key is None else key}
        return httpx.Client(base_url=f"{self.url}/api/v1", headers=headers, timeout=60)
