"""The other end of the bus: one script's commands to many ranks.  No torch.

submit    number it, note it in the journal, send it; the reply resolves its future
supervise a thread: ranks that are lost are named, started again, and told what they knew
"""

import atexit
import collections
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self

from megatrain.bus.address import Address
from megatrain.bus.codec import Failure, encode
from megatrain.bus.commands import (
    Command,
    Inspect,
    Ping,
    RestoreSnapshot,
    Save,
    Stop,
    TakeSnapshot,
)
from megatrain.bus.failures import error_of
from megatrain.bus.frames import Kind
from megatrain.bus.history import History
from megatrain.bus.jobs import SEQ, Job
from megatrain.bus.link import Link
from megatrain.bus.pending import Answer, CommandFuture, Pending
from megatrain.bus.ranks import Ranks, RanksAt
from megatrain.config.bus import BusConfig
from megatrain.errors import (
    BusError,
    CancelledCommandError,
    ConfigError,
    MegatrainError,
    RankError,
)
from megatrain.parallel.layout import DeviceMesh

logger = logging.getLogger(__name__)

POLL_S = 0.1
"""Seconds between looks at the ranks."""
STOP_S = 15.0
"""Seconds that ranks get to stop in an orderly way."""


class Driver:
    """Commands to ranks, in one order, each done once; also across losses of ranks.

    Any thread may call it.  A context manager: leaving it ends what it started.
    """

    def __init__(
        self, ranks: Ranks, config: BusConfig, *, mesh: DeviceMesh | None, can_snapshot: bool
    ) -> None:
        """Start or reach the ranks.

        Raises BusError if they cannot be reached or refuse, RankError if they end, ConfigError if
        they are laid out otherwise than `mesh`.
        """
        self.config = config
        self._ranks = ranks
        self._history = History(config.journal, config.recovery, can_snapshot=can_snapshot)
        self._state = threading.Condition(threading.RLock())
        self._order = threading.Lock()
        """Held while a command is numbered and sent, so that numbers arrive in order."""
        self._pending: dict[int, Pending] = {}
        self._last_seq = self._history.last_seq
        self._soon: collections.deque[Command] = collections.deque()
        self._restarts: list[float] = []
        self._broken: MegatrainError | None = None
        self._closing = self._closed = False
        self._model_numbers = itertools.count()
        self.undone: dict[int, Future[Any]] = {}
        """Futures of commands that a driver before this one had accepted, by number."""
        self.losses: list[str] = []
        """What was said of every loss of ranks so far."""
        try:
            self._link = self._reach(ranks.start(), config.connect_timeout_s)
            self._check_mesh(mesh)
            self._take_up_undone()
            self._tell_again(self._link)
        except BaseException:
            self._history.close()
            ranks.close()
            raise
        self._supervisor = threading.Thread(
            target=self._supervise, name="bus-supervisor", daemon=True
        )
        self._supervisor.start()
        atexit.register(self.close)

    @classmethod
    def launch(cls, ranks: Ranks, config: BusConfig, *, mesh: DeviceMesh | None = None) -> Self:
        """Start ranks that end with this driver."""
        return cls(ranks, config, mesh=mesh, can_snapshot=True)

    @classmethod
    def connect(cls, address: str, config: BusConfig, *, mesh: DeviceMesh | None = None) -> Self:
        """Drive ranks that run elsewhere: `megatrain worker`."""
        ranks = RanksAt(Address.parse(address))
        return cls(ranks, config, mesh=mesh, can_snapshot=config.journal is not None)

    def _check_mesh(self, mesh: DeviceMesh | None) -> None:
        theirs = DeviceMesh(**self._link.welcome.mesh)
        if mesh is not None and mesh != theirs:
            self._link.close()
            raise ConfigError(
                f"the ranks are laid out as {theirs.describe()}, not as {mesh.describe()}",
                hint="leave global_device_mesh out, or start them with that mesh",
            )
        self.mesh = theirs

    @property
    def welcome(self) -> Any:
        """What the ranks said of themselves: hosts, process ids, platform."""
        return self._link.welcome

    @property
    def health(self) -> dict[str, Any]:
        """The last beats of all ranks, and how many commands wait there."""
        return self._link.health

    def model_key(self) -> str:
        """Return a name for another model; the same in the same order after a new start."""
        return f"model-{next(self._model_numbers)}"

    def submit(
        self,
        command: Command,
        *,
        deadline_s: float | None = None,
        finish: Callable[[Any, list[str]], Any] | None = None,
    ) -> "Future[Any]":
        """Accept a command and return its future; commands are done in the order of acceptance.

        `finish` makes the result of the value and the names of what is trained.  Waits while
        `max_queued` commands wait.  Raises ConfigError for what cannot travel and BusError if the
        command cannot be noted or the driver has given up; then it is not done.
        """
        payload = encode(command)
        if len(payload) + 64 > self.config.max_message_bytes:
            raise BusError(
                f"a message must have at most {self.config.max_message_bytes} bytes: "
                f"{len(payload)}",
                hint="send smaller batches, or raise max_message_bytes on both ends",
            )
        while True:
            with self._state:
                self._state.wait_for(self._has_room)
            with self._order:  # who waits for room must not keep the supervisor from sending
                if self._has_room():
                    self._check_open()
                    self._flush_soon()
                    return self._accept(command, payload, deadline_s, finish)

    def _has_room(self) -> bool:
        return len(self._pending) < self.config.max_queued or self._is_over()

    def _accept(
        self,
        command: Command,
        payload: bytes,
        deadline_s: float | None,
        finish: Callable[[Any, list[str]], Any] | None,
    ) -> "Future[Any]":
        with self._state:
            seq, limit = self._last_seq + 1, deadline_s or command.deadline_s
            if _redo(command):
                self._history.accept(seq, payload, limit)
            self._last_seq = seq
            future = CommandFuture(lambda: self._cancel(seq))
            pending = Pending(
                seq, type(command).__name__, payload, limit, future, finish or _value_alone
            )
            self._pending[seq] = pending
        self._send(pending)
        return future

    def _is_over(self) -> bool:
        return self._broken is not None or self._closing

    def _check_open(self) -> None:
        if self._broken is not None:
            raise RankError(
                f"the ranks are lost for good: {self._broken.message}",
                hint="megatrain.shutdown() and initialize again; a journal given to "
                "initialize(journal=...) goes on where this one ended",
            ) from self._broken
        if self._closing:
            raise BusError("this driver is closed")

    def call(self, command: Command, *, deadline_s: float | None = None) -> Any:
        """Do a command and return its value.  Raises what the ranks raised."""
        return self.submit(command, deadline_s=deadline_s).result()

    def submit_soon(self, command: Command) -> None:
        """Send a command before the next one; for finalizers, which must not wait."""
        self._soon.append(command)

    def _flush_soon(self) -> None:
        while self._soon and not self._is_over():
            command = self._soon.popleft()
            self._accept(command, encode(command), None, None)

    def ping(self) -> float:
        """Return the seconds of a command that does nothing on any rank."""
        start = time.perf_counter()
        self.call(Ping())
        return time.perf_counter() - start

    def inspect(self) -> dict[str, Any]:
        """Return what the ranks hold."""
        found: dict[str, Any] = self.call(Inspect())
        return found

    def _send(self, pending: Pending) -> None:
        """Send a command; if the connection is lost, the supervisor sends it again."""
        with self._state:
            acknowledged = min(self._pending, default=self._last_seq + 1) - 1
        job = Job(pending.seq, pending.deadline_s, pending.payload, acknowledged)
        try:
            self._link.send(Kind.COMMAND, job.pack())
        except BusError as error:
            logger.debug("command %d waits for the ranks: %s", pending.seq, error.message)

    def _cancel(self, seq: int) -> bool:
        with self._state:
            pending = self._pending.get(seq)
            if pending is None:
                return False
            answer = pending.answer = pending.answer or Answer()
        try:
            self._link.send(Kind.CANCEL, SEQ.pack(seq))
        except BusError:
            return False
        return answer.wait()

    def _on_cancelled(self, seq: int, in_time: bool) -> None:
        with self._state:
            pending = self._pending.get(seq)
            if pending is None or pending.answer is None:
                return
            if in_time:
                self._history.drop(seq)
                del self._pending[seq]
                self._state.notify_all()
        if in_time and isinstance(pending.future, CommandFuture):
            pending.future.cancel_locally()
        pending.answer.set(in_time)

    def _on_reply(self, seq: int, reply: dict[str, Any]) -> None:
        with self._state:
            pending = self._pending.pop(seq, None)
            if pending is None:
                return  # done again for its effect
            self._history.done(seq)
            self._state.notify_all()
        if pending.answer is not None:
            pending.answer.set(False)
        resolve(pending, reply)

    def _take_up_undone(self) -> None:
        """Make futures for what a driver before this one had accepted and not heard of."""
        known = self._history.commands()
        for seq in self._history.undone:
            if seq in known:
                deadline_s, payload = known[seq]
                self.undone[seq] = future = CommandFuture(lambda seq=seq: self._cancel(seq))  # type: ignore[misc]
                self._pending[seq] = Pending(
                    seq, "command", payload, deadline_s, future, _value_alone
                )

    def _reach(self, address: Address, timeout_s: float) -> Link:
        """Return a connection to rank 0, as soon as it listens."""
        limit = time.monotonic() + timeout_s
        while True:
            if (failure := self._ranks.failure()) is not None:
                raise RankError(
                    f"ranks ended while they started: {failure}\n{self._ranks.output()}"
                )
            try:
                return Link(address, self.config, self._history.session)
            except OSError as error:
                refused = isinstance(error, BusError) and "refused" in str(error)
                if refused or time.monotonic() > limit:
                    if isinstance(error, BusError):
                        raise
                    raise BusError(
                        f"no ranks listen at {address} after {timeout_s:g} s: {error}",
                        hint="start them with megatrain worker --listen",
                    ) from error
            time.sleep(0.05)

    def _tell_again(self, link: Link) -> None:
        """Bring ranks to where they were, if they are new, and send what they have not answered."""
        again: dict[int, tuple[float, bytes]] = {}
        if link.welcome.epoch != self._history.epoch:
            self._history.forget_expected()
            if self._history.snapshot is not None:
                seq, directory = self._history.snapshot
                command = RestoreSnapshot(directory=directory)
                again[seq] = (command.deadline_s, encode(command))
            again |= self._history.commands()
            self._history.note_epoch(link.welcome.epoch)
        with self._state:
            waiting = {p.seq: (p.deadline_s, p.payload) for p in self._pending.values()}
            first = min(waiting, default=self._last_seq + 1)
        link.listen(self._on_reply, self._on_cancelled)
        for seq, (deadline_s, payload) in sorted((again | waiting).items()):
            link.send(Kind.COMMAND, Job(seq, deadline_s, payload, first - 1).pack())

    def _supervise(self) -> None:
        """Look after the ranks until the driver is closed or gives up."""
        while not self._is_over():
            time.sleep(POLL_S)
            if self._closing:
                return
            trouble = self._trouble()
            try:
                if trouble is not None:
                    self._recover(trouble)
                self._look_after_snapshots()
            except MegatrainError as error:
                self._give_up(error)

    def _trouble(self) -> str | None:
        """Return what is wrong with the ranks, if anything is."""
        link = self._link
        if (failure := self._ranks.failure()) is not None:
            time.sleep(POLL_S)  # what rank 0 says of it may be on its way
            return link.lost["text"] if link.lost else failure
        if link.lost is not None:
            return str(link.lost["text"]) + "\n" + str(link.lost["stacks"])
        if link.error is not None:
            return link.error.message
        silence = time.monotonic() - link.heard_at
        if silence > self.config.heartbeat_timeout_s:
            who = f"rank 0 (host {link.welcome.hosts[0]}, pid {link.welcome.pids[0]})"
            return f"{who} has given no sign of life for {silence:.1f} s"
        return None

    def _recover(self, trouble: str) -> None:
        """Have the ranks started again and bring them to where they were."""
        output = self._ranks.output()
        self.losses.append(trouble)
        logger.error("ranks are lost: %s", trouble)
        self._link.close()
        with self._order:  # nobody sends meanwhile
            self._count(trouble, output)
            timeout_s = self.config.recovery.restart_timeout_s
            limit = time.monotonic() + timeout_s
            while not self._closing:
                try:
                    self._link = self._reach(self._ranks.start(), timeout_s)
                    self._tell_again(self._link)
                    break
                except BusError as error:
                    if time.monotonic() > limit:
                        raise
                    logger.warning("the ranks are not there again yet: %s", error.message)
                    time.sleep(1.0)
        logger.info("the ranks are there again (%d)", len(self._restarts))

    def _count(self, trouble: str, output: str) -> None:
        """Count a loss; give up the command that has caused two, or everything after too many."""
        policy, now = self.config.recovery, time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < policy.reset_after_s]
        hint = f"last words:\n{output}" if output else None
        with self._state:
            oldest = self._pending.get(min(self._pending, default=0))
            if oldest is not None:
                oldest.attempts += 1
                if oldest.attempts >= policy.max_attempts:
                    self._drop(oldest, trouble, hint)
        if len(self._restarts) >= policy.max_restarts:
            raise RankError(
                f"{trouble} (after {len(self._restarts)} restarts, of which "
                f"{policy.max_restarts} are allowed)",
                hint=hint,
            )
        self._restarts.append(now)

    def _drop(self, pending: Pending, trouble: str, hint: str | None) -> None:
        self._history.drop(pending.seq)
        del self._pending[pending.seq]
        self._state.notify_all()
        pending.future.set_exception(
            RankError(
                f"{pending.name} (command {pending.seq}) was given up: ranks were lost over it "
                f"{pending.attempts} times, the last time since {trouble}",
                hint=hint,
                command=pending.name,
            )
        )

    def _give_up(self, error: MegatrainError) -> None:
        logger.error("the driver gives up: %s", error)
        with self._state:
            self._broken = error
            waiting, self._pending = list(self._pending.values()), {}
            self._state.notify_all()
        for pending in waiting:
            if not pending.future.done():
                pending.future.set_exception(error)
            if pending.answer is not None:
                pending.answer.set(False)
        self._link.close()
        self._ranks.close()

    def _look_after_snapshots(self) -> None:
        with self._state:
            self._history.settle()
            due = self._history.is_due() and not self._is_over()
        if not due:
            return
        with self._order:
            seq = self._last_seq + 1
            command = TakeSnapshot(directory=self._history.directory(seq))
            taken = self._accept(command, encode(command), None, None)
            self._history.expect(seq, self.mesh.world_size)
        taken.add_done_callback(self._snapshot_begun)

    def _snapshot_begun(self, taken: "Future[Any]") -> None:
        if not taken.cancelled() and (error := taken.exception()) is not None:
            logger.warning("no snapshot was taken: %s", error)
            with self._state:
                self._history.forget_expected()

    def close(self) -> None:
        """End the ranks that it started, or leave the others; idempotent.

        Commands that wait are given up with CancelledCommandError.
        """
        with self._state:
            if self._closing:
                return
            self._closing = True
            waiting, self._pending = list(self._pending.values()), {}
            self._state.notify_all()
        for pending in waiting:
            if not pending.future.done():
                pending.future.set_exception(
                    CancelledCommandError(f"the driver was closed before {pending.name} was done")
                )
        if threading.current_thread() is not self._supervisor:
            self._supervisor.join()
        if self._broken is None:
            self._say_goodbye()
        self._closed = True
        atexit.unregister(self.close)
        self._link.close()
        self._ranks.close()
        self._history.close()

    def _say_goodbye(self) -> None:
        command: Command = Stop()
        if isinstance(self._ranks, RanksAt):
            if not self._history.is_temporary:
                return  # a driver with this journal may come back
            command = RestoreSnapshot(directory=None)
        try:
            with self._order:
                said = self._accept(command, encode(command), None, None)
            said.result(timeout=STOP_S)
        except (MegatrainError, TimeoutError) as error:
            logger.debug("the ranks did not hear the end: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _redo(command: Command) -> bool:
    """Tell whether ranks that start anew must be told it again."""
    return command.mutates or (isinstance(command, Save) and command.background)


def _value_alone(value: Any, trained: list[str]) -> Any:
    return value


def resolve(pending: Pending, reply: dict[str, Any]) -> None:
    """Give a future what a reply says."""
    failure = reply.get("failure")
    if isinstance(failure, Failure):
        pending.future.set_exception(error_of(failure))
        return
    try:
        value = pending.finish(reply.get("value"), list(reply.get("trained", ())))
    except Exception as error:  # noqa: BLE001 - raised where the result is asked for
        pending.future.set_exception(error)
        return
    pending.future.set_result(value)
