"""A thread that looks after a driver's ranks: losses are named, ranks start again, and learn what
they knew; snapshots are taken when they are due.  No torch.
"""

import logging
import threading
import time
from concurrent.futures import Future
from typing import Any, Protocol

from megatrain.bus.commands import Command, TakeSnapshot
from megatrain.bus.events import Event, Observers
from megatrain.bus.history import History
from megatrain.bus.link import Link
from megatrain.bus.outstanding import Outstanding
from megatrain.bus.pending import Pending
from megatrain.bus.ranks import Ranks
from megatrain.bus.trouble import Trouble, trouble_of
from megatrain.config.bus import BusConfig
from megatrain.errors import BusError, DeadlineError, MegatrainError, RankError
from megatrain.parallel.layout import DeviceMesh

logger = logging.getLogger(__name__)

POLL_S = 0.1
"""Seconds between looks at the ranks."""
STALL_S = 1.0
"""Seconds between two looks after which this process itself had stood still."""
PAUSE_S = 60.0
"""Seconds until a snapshot is tried again that ranks could not take."""


class Supervised(Protocol):
    """What a supervisor asks of a driver; each as Driver says it."""

    config: BusConfig
    ranks: Ranks
    link: Link
    mesh: DeviceMesh
    history: History
    observers: Observers
    outstanding: Outstanding
    state: threading.Condition
    order: threading.Lock
    last_seq: int

    @property
    def is_over(self) -> bool: ...
    def accept(self, command: Command) -> Future[Any]: ...
    def reconnect(self, timeout_s: float) -> None: ...
    def give_up(self, error: MegatrainError) -> None: ...


class Supervisor:
    """Looks after one driver's ranks until it is closed or gives up."""

    def __init__(self, driver: Supervised) -> None:
        self._driver, self._policy = driver, driver.config.recovery
        self._restarts: list[float] = []
        """When ranks were started again."""
        self._taking: Future[Any] | None = None
        """Of the snapshot that ranks were last asked for."""
        self._snapshot_after = 0.0
        self.losses: list[str] = []
        """What was said of every loss so far."""
        self._thread = threading.Thread(target=self._run, name="bus-supervisor", daemon=True)
        self._thread.start()

    @property
    def num_restarts(self) -> int:
        """How often ranks were started again, as far as it still counts."""
        return len(self._restarts)

    def join(self) -> None:
        """Wait until the thread has ended, unless this is it."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        driver = self._driver
        while not driver.is_over:
            began = time.monotonic()
            time.sleep(POLL_S)
            if driver.is_over:
                return
            if time.monotonic() - began > STALL_S:  # what ranks said meanwhile was not read yet
                driver.link.heard_at = time.monotonic()
            found = trouble_of(driver.ranks, driver.link, driver.config.heartbeat_timeout_s)
            try:
                if found is not None and not driver.is_over:
                    self._recover(found)
                self._look_after_snapshots()
            except MegatrainError as error:
                if not driver.is_over:
                    driver.give_up(error)
            except Exception as error:
                logger.exception("the supervisor of ranks failed")
                driver.give_up(RankError(f"the driver failed: {type(error).__name__}: {error}"))

    def _recover(self, found: Trouble) -> None:
        """Have the ranks started again and bring them to where they were."""
        driver, began = self._driver, time.monotonic()
        output = driver.ranks.output()
        self.losses.append(str(found))
        driver.observers.tell(Event("lost", text=found.text))
        logger.error("ranks are lost: %s", found)
        driver.link.close()
        with driver.order:  # nobody sends meanwhile
            self._count(found, output)
            timeout_s = self._policy.restart_timeout_s
            limit = time.monotonic() + timeout_s
            while not driver.is_over:
                try:
                    driver.reconnect(timeout_s)
                    break
                except BusError as error:
                    if time.monotonic() > limit:
                        raise
                    logger.warning("the ranks are not there again yet: %s", error.message)
                    time.sleep(1.0)
            else:
                return  # it was closed meanwhile
        seconds = time.monotonic() - began
        driver.observers.tell(Event("recovered", seconds=seconds))
        logger.info("the ranks are there again after %.1f s (%d)", seconds, len(self._restarts))

    def _count(self, found: Trouble, output: str) -> None:
        """Count a loss; give up the command that has caused two, or everything after too many."""
        policy, now = self._policy, time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < policy.reset_after_s]
        hint = f"last words:\n{output}" if output else None
        blamed = self._driver.outstanding.blamed()
        if blamed is not None:
            blamed.troubles.append(found.signature)
            if blamed.troubles.count(found.signature) >= policy.max_attempts:
                self._driver.outstanding.drop(blamed, _poison(blamed, found, hint))
        if len(self._restarts) >= policy.max_restarts:
            raise RankError(
                f"{found} (after {len(self._restarts)} restarts, of which "
                f"{policy.max_restarts} are allowed)",
                hint=hint,
            )
        self._restarts.append(now)

    def _look_after_snapshots(self) -> None:
        driver = self._driver
        if driver.is_over:
            return
        with driver.state:
            settled = driver.history.settle()
            due = driver.history.is_due() and (self._taking is None or self._taking.done())
            due = due and time.monotonic() > self._snapshot_after
        if settled is not None:
            driver.observers.tell(Event("snapshot", settled))
        if not due:
            return
        with driver.order:
            seq = driver.last_seq + 1
            taken = driver.accept(TakeSnapshot(directory=driver.history.directory(seq)))

        def begun(taken: Future[Any]) -> None:
            """Await its files; all replies before this one have come, too."""
            if not taken.cancelled() and (error := taken.exception()) is not None:
                logger.warning("no snapshot was taken: %s", error)
                self._snapshot_after = time.monotonic() + PAUSE_S
                return
            with driver.state:
                driver.history.expect(seq, driver.mesh.world_size)

        self._taking = taken
        taken.add_done_callback(begun)


def _poison(pending: Pending, found: Trouble, hint: str | None) -> MegatrainError:
    """Return the error of a command over which ranks were lost in the same way again."""
    times = pending.troubles.count(found.signature)
    what = f"{pending.name} (command {pending.seq}) was given up: "
    if found.is_late:
        return DeadlineError(
            f"{what}it was not done within {pending.deadline_s:g} s, {times} times: {found}",
            hint="give it more time (timeout_s), or less work",
        )
    return RankError(
        f"{what}ranks were lost over it {times} times in the same way, the last time since {found}",
        hint=hint,
        command=pending.name,
    )
