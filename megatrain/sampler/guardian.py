"""Runs one command, and ends it, with all that it started, when whoever started us is gone.

    python guardian.py COMMAND ARGUMENT...

Our standard input is a pipe whose other end is held by the parent: it closes even if the parent is
killed.  Standard library alone; run by its path.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

GRACE_S = 10.0
"""Seconds between the request to end and the kill."""
PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def main(command: list[str]) -> int:
    """Run the command and return its exit status; 128 + n for one that signal n ended."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )

    def end(*ignored: Any) -> None:
        _signal_group(child.pid, signal.SIGTERM)
        killer = threading.Timer(GRACE_S, _signal_group, (child.pid, signal.SIGKILL))
        killer.daemon = True
        killer.start()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        end()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's goes to the parent, which ends us
    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    _signal_group(child.pid, signal.SIGKILL)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
