"""A rank's sign of life: a thread writes it to the store, whatever the main thread does."""

import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from megatrain.bus.beat import EXIT_LOST, Beat, key
from megatrain.parallel import phase


class Pulse:
    """This rank's beats.  The main thread says what it does; a thread of its own tells."""

    def __init__(self, store: Any, rank: int, *, interval_s: float) -> None:
        """`store` is a connection of its own to the ranks' store."""
        self._store, self._interval_s = store, interval_s
        self._beat = Beat(rank, socket.gethostname(), os.getpid())
        self._began = 0.0
        self._count = 0
        self._late: tuple[int, str] = (0, "")
        """The stack that was taken of a command that was late, with its number."""
        self._stopped = threading.Event()
        self._tell()
        phase.observe(self._enter)
        threading.Thread(target=self._run, name="bus-pulse", daemon=True).start()

    def begin(self, seq: int, command: str, deadline_s: float) -> None:
        """Say that a command begins."""
        self._began = time.monotonic()
        self._beat = replace(
            self._beat, seq=seq, command=command, deadline_s=deadline_s, failed=False
        )
        phase.enter(phase.VALIDATING)

    def name(self, command: str) -> None:
        """Say what the command is called, once it is known."""
        self._beat = replace(self._beat, command=command)

    def fail(self, error: str = "") -> None:
        """Say that this rank has raised an error, and that the others may not know."""
        self._beat = replace(self._beat, failed=True, error=error)

    def end(self, *, tokens: int = 0, adapters: Mapping[str, int] | None = None) -> None:
        """Say that the command is done, how many tokens it saw, and where adapters are now."""
        total = self._beat.tokens + tokens
        self._beat = replace(
            self._beat, command="", failed=False, tokens=total, adapters=dict(adapters or {})
        )
        phase.enter(phase.IDLE)

    def close(self) -> None:
        """Stop beating."""
        self._stopped.set()
        phase.observe(None)

    def _enter(self, name: str) -> None:
        self._beat = replace(self._beat, phase=name)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self._tell()
            except Exception as error:  # noqa: BLE001 - who cannot say so counts as lost anyway
                if not self._stopped.is_set():
                    os.write(
                        2, f"no sign of life can be given: {error!r}: this rank ends\n".encode()
                    )
                    os._exit(EXIT_LOST)

    def _tell(self) -> None:
        beat = self._beat
        running = time.monotonic() - self._began if beat.command else 0.0
        if beat.command and running > beat.deadline_s and self._late[0] != beat.seq:
            self._late = beat.seq, _stack()
        self._count += 1
        told = replace(
            beat,
            count=self._count,
            running_s=running,
            stack=self._late[1] if self._late[0] == beat.seq and beat.command else "",
            resident_bytes=_resident(),
        )
        self._store.set(key(told.rank), json.dumps(asdict(told)))
        self._store.get(key(told.rank))  # a store that is cut off takes all, and answers nothing


def _stack() -> str:
    """Return the Python stacks of all threads of this process, the main thread's last."""
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            dump = file.read().decode(errors="replace")
    except OSError as error:  # a full disk is no reason to end
        return f"its stack could not be taken: {error}"
    if dump.endswith(
        "...\n"
    ):  # faulthandler ends after 100 threads, and the main thread is its last
        dump += f"\n{_main_stack()}"
    return dump


def _main_stack() -> str:
    """Return the main thread's stack in faulthandler's form, innermost frame first."""
    main = threading.main_thread().ident
    lines = [f"Thread 0x{main or 0:016x} (most recent call first):"]
    frame = sys._current_frames().get(main or 0)
    while frame is not None:
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
        frame = frame.f_back
    return "\n".join(lines) + "\n"


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0  # no such file on this system
