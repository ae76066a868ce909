"""A child process of ours: started, its log passed on, and ended with us, however we end."""

import asyncio
import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

GUARDIAN = Path(__file__).with_name("guardian.py")
TAIL_LINES = 30
"""Last lines of a child's log that an error shows."""
END_S = 15.0
"""Seconds that the guardian has to end the child and itself."""


class ChildProcess:
    """A command that runs under a guardian."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        """`name` stands before each line of its log."""
        self.name, self._process = name, process
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._pump = asyncio.create_task(self._pass_on())

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], env: Mapping[str, str]
    ) -> "ChildProcess":
        """Start a command.  `env` is added to this process's environment."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(GUARDIAN),
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | dict(env),
        )
        return cls(name, process)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    @property
    def pid(self) -> int:
        """Of the guardian."""
        return self._process.pid

    @property
    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self._tail)

    async def wait(self) -> int:
        """Wait for its end; return the exit status, 128 + n after signal n."""
        status = await self._process.wait()
        await asyncio.wait([self._pump], timeout=1.0)
        return status

    async def end(self) -> None:
        """End it and all that it started; idempotent."""
        if self.is_running:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), END_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._pump.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._pump

    async def _pass_on(self) -> None:
        """Log each line, and keep the last ones; a line longer than the buffer comes in pieces."""
        assert self._process.stdout is not None
        rest = b""
        while data := await self._process.stdout.read(65536):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > 65536:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._note(line)
        if rest:
            self._note(rest)

    def _note(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._tail.append(text)
            logger.info("%s: %s", self.name, text)
