"""Write a checkpoint while training goes on: one thread of rank 0, one checkpoint at a time.

Threads of the interpreter are waited for at its exit, so nothing that was begun is lost then.
"""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class BackgroundWriter:
    """At most one piece of work, whose failure comes up when it is next waited for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; the one before must have been waited for."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(work,), name="megatrain-save")
        self._thread.start()

    def wait(self) -> None:
        """Wait for what was begun, if anything; raise what it raised, once."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - wait raises it
            self._failure = error
            logger.error("a checkpoint was not written: %s", error)
