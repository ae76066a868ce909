"""Rank 0 names who is gone before it ends itself: whoever started it ends all ranks at once.

torchrun sends SIGTERM to the others as soon as one has failed, long before silence would tell.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from megatrain.bus.beat import Beat
from megatrain.bus.watch import Loss, doing, who


def on_sigterm(end: Callable[[], None]) -> None:
    """Call a function from a thread when SIGTERM comes, whatever the main thread waits for.

    Call it before other threads are started: they must not take the signal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        end()

    threading.Thread(target=wait, name="bus-sigterm", daemon=True).start()


def the_dead(beats: list[Beat]) -> Loss | None:
    """Return the loss of those ranks of this host whose processes are gone; None if all run."""
    here = socket.gethostname()
    gone = [beat for beat in beats if beat.host == here and not _runs(beat.pid)]
    if not gone:
        return None
    text = "; ".join(f"{who(beat)} has ended{doing(beat)}" for beat in gone)
    return Loss(tuple(beat.rank for beat in gone), text)


def _runs(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X")
