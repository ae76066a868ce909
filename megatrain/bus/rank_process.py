"""One rank's process as its driver sees it: made anew, or forked by a server.  No torch."""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol

from megatrain.bus.beat import EXIT_LOST
from megatrain.errors import BusError, ConfigError, RankError

START_S = 120.0
"""Seconds that importing Megatron may take."""
DEVICE_FILES = ("nvidia[0-9]*", "davinci[0-9]*")
"""In /dev, where a rank may make a context, which no fork survives."""


def how_it_ended(status: int) -> str:
    """Say what an exit status, negative for a signal, means."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"


class RankProcess(Protocol):
    """A process whose standard input and output lead here."""

    pid: int
    output: IO[bytes]

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""

    def kill(self) -> None:
        """End it at once, if it runs."""

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit status, or None if it still runs after that long."""

    def close(self) -> None:
        """Close its standard input: a rank ends then."""


class Spawner(Protocol):
    """Starts ranks."""

    def spawn(self, environment: Mapping[str, str]) -> RankProcess:
        """Start a rank in this environment."""


class FreshProcess:
    """A rank in an interpreter of its own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatrain.bus"],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the driver, which then ends them
        )
        assert self._process.stdout is not None
        self.pid, self.output = self._process.pid, self._process.stdout

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()


class FreshSpawner:
    """Starts each rank in an interpreter of its own."""

    def spawn(self, environment: Mapping[str, str]) -> RankProcess:
        return FreshProcess(environment)


class ForkedProcess:
    """A rank that a ForkServer has forked."""

    def __init__(self, pid: int, output: IO[bytes], stdin: int) -> None:
        self.pid, self.output, self._stdin = pid, output, stdin
        self._ended = threading.Event()
        self._status: int | None = None

    def ended(self, status: int) -> None:
        """Note what the server says of its end."""
        self._status = status
        self._ended.set()

    def poll(self) -> int | None:
        return self._status

    def kill(self) -> None:
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> int | None:
        self._ended.wait(timeout_s)
        return self._status

    def close(self) -> None:
        if self._stdin >= 0:
            os.close(self._stdin)
        self._stdin = -1


class ForkServer:
    """The driver's end of fork_server.py.  It is started when the first rank is."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._answers: list[int] = []
        self._changed = threading.Condition()
        self._ready = False
        self._ranks: dict[int, ForkedProcess] = {}
        self._early: dict[int, int] = {}
        """Exit statuses of ranks that ended before their number was heard."""

    def spawn(self, environment: Mapping[str, str]) -> RankProcess:
        """Fork a rank.  Raises RankError if the server does not start or answer."""
        if self._server is None or self._server.poll() is not None:
            self._start()
        assert self._socket is not None
        stdin, our_stdin = os.pipe()
        output, stdout = os.pipe()
        try:
            request = json.dumps(dict(environment)).encode() + b"\n"
            socket.send_fds(self._socket, [request], [stdin, stdout])
            rank = self._adopt(self._answer(), output, our_stdin)
        except (OSError, BusError) as error:
            os.close(our_stdin)
            os.close(output)
            raise RankError(f"no rank could be forked: {error}") from error
        finally:
            os.close(stdin)
            os.close(stdout)
        return rank

    def _adopt(self, pid: int, output: int, stdin: int) -> ForkedProcess:
        rank = ForkedProcess(pid, os.fdopen(output, "rb"), stdin)
        with self._changed:
            self._ranks[pid] = rank
            if pid in self._early:
                rank.ended(self._early.pop(pid))
        return rank

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        self._ready, self._answers = False, []
        self._server = subprocess.Popen(
            [sys.executable, "-m", "megatrain.bus.fork_server", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._socket = ours
        threading.Thread(
            target=self._listen, args=(ours, self._server), name="bus-fork-server", daemon=True
        ).start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._is_gone(), START_S)
        if not self._ready:
            raise RankError(
                f"what forks ranks did not start: exit status {self._server.poll()}",
                hint="what it wrote is above",
            )

    def _is_gone(self) -> bool:
        return self._server is None or self._server.poll() is not None

    def _listen(self, connection: socket.socket, server: "subprocess.Popen[bytes]") -> None:
        with contextlib.suppress(OSError), connection.makefile("rb") as lines:
            for line in lines:
                self._hear(json.loads(line))
        server.kill()
        server.wait()
        with self._changed:
            for rank in self._ranks.values():
                if rank.poll() is None:  # its end will not be heard of
                    rank.kill()
                    rank.ended(EXIT_LOST)
            self._ranks = {}
            self._changed.notify_all()

    def _hear(self, said: dict[str, int]) -> None:
        with self._changed:
            if not said:
                self._ready = True
            elif "status" not in said:
                self._answers.append(said["pid"])
            elif said["pid"] in self._ranks:
                self._ranks.pop(said["pid"]).ended(said["status"])
            else:
                self._early[said["pid"]] = said["status"]
            self._changed.notify_all()

    def _answer(self) -> int:
        limit = time.monotonic() + START_S
        with self._changed:
            while not self._answers:
                if self._is_gone() or not self._changed.wait(max(0.0, limit - time.monotonic())):
                    raise RankError("what forks ranks does not answer")
            return self._answers.pop(0)

    def close(self) -> None:
        """End the server; a child of its process does nothing."""
        if os.getpid() != self._pid:
            return
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        self._server = self._socket = None


_fork_server: ForkServer | None = None


def _the_fork_server() -> ForkServer:
    """Return the one server of this process; it ends with it."""
    global _fork_server
    if _fork_server is None:
        _fork_server = ForkServer()
        atexit.register(_fork_server.close)
    return _fork_server


def spawner(platform: str, *, fork: bool) -> Spawner:
    """Return what starts ranks on a platform.  Raises ConfigError where a fork is not safe."""
    if not fork:
        return FreshSpawner()
    has_device = any(any(Path("/dev").glob(pattern)) for pattern in DEVICE_FILES)
    if platform not in ("auto", "cpu") or (platform == "auto" and has_device):
        raise ConfigError(
            f"fork_ranks is for processors, since a device's context does not survive a fork: "
            f"platform={platform!r}",
            hint="leave fork_ranks out, or set platform='cpu'",
        )
    return _the_fork_server()
