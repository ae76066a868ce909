"""The other end of the bus: one script's commands to many ranks.  No torch.

submit    number it, note it in the journal, send it; the reply resolves its future
recovery  supervisor.py: ranks that are lost start again, and are told what they knew
"""

import atexit
import collections
import itertools
import logging
import os
import threading
import time
from concurrent.futures import Future
from typing import Any, Self

from megatrain.bus.address import Address
from megatrain.bus.adoption import adopt, told_again
from megatrain.bus.codec import encode
from megatrain.bus.commands import (
    FILES_S,
    Command,
    Inspect,
    Ping,
    RestoreSnapshot,
    Save,
    Stop,
    is_redone,
)
from megatrain.bus.events import Event, Observers
from megatrain.bus.frames import Kind
from megatrain.bus.history import History
from megatrain.bus.jobs import SEQ, Job
from megatrain.bus.link import Link, reach
from megatrain.bus.outstanding import Outstanding
from megatrain.bus.pending import Answer, Finish, Pending, value_alone
from megatrain.bus.ranks import Ranks, RanksAt
from megatrain.bus.supervisor import Supervisor
from megatrain.bus.telemetry.telemetry import Telemetry
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

FOREVER_S = 1e9
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
        self.config, self.ranks = config, ranks
        try:
            self.history = History(config.journal, config.recovery, can_snapshot=can_snapshot)
        except BaseException:
            ranks.close()
            raise
        self.state = threading.Condition(threading.RLock())
        self.order = threading.Lock()
        """Held while a command is numbered and sent, so that numbers arrive in order."""
        self.observers = Observers()
        self.last_seq = self.history.last_seq
        self.outstanding = Outstanding(self.history, self.observers, self.state, self.give_up)
        self._soon: collections.deque[Command] = collections.deque()
        self._broken: MegatrainError | None = None
        self._closing = self._has_saved = False
        self._pid = os.getpid()
        self._model_numbers = itertools.count()
        self.undone: dict[int, Future[Any]] = {}
        """Futures of commands that a driver before this one had accepted, by number."""
        self.adopted: dict[str, Future[Any]] = {}
        """By tag, those of all its commands that are told again or were not confirmed: the same
        value or error comes as the first time (without `finish`), StateError where it cannot come
        again.  Each is to be confirmed.  What is not here was not done, or was confirmed."""
        self.telemetry = Telemetry(self)
        try:
            self.telemetry.open(
                metrics_port=config.metrics_port,
                metrics_host=config.metrics_host,
                traces=config.traces,
            )
            self.link = self._reach(ranks.start(), config.connect_timeout_s)
            self.mesh = self.link.check_mesh(mesh)
            known = self.link.welcome.last_seq
            self.undone, self.adopted = adopt(self.history, self.outstanding, known, self._cancel)
            self._tell_again(self.link)
        except BaseException:
            if hasattr(self, "link"):
                self.link.close()
            self.telemetry.close()
            self.history.close()
            ranks.close()
            raise
        self.supervisor = Supervisor(self)
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

    @property
    def welcome(self) -> Any:
        """What the ranks said of themselves: hosts, process ids, platform."""
        return self.link.welcome

    @property
    def health(self) -> dict[str, Any]:
        """The last beats of all ranks, and how many commands wait there."""
        return self.link.health

    @property
    def losses(self) -> list[str]:
        """What was said of every loss of ranks so far."""
        return self.supervisor.losses

    @property
    def num_pending(self) -> int:
        """Commands that were accepted and not answered."""
        return len(self.outstanding.pending)

    @property
    def is_over(self) -> bool:
        """Whether it is closed, or has given up."""
        return self._broken is not None or self._closing

    def model_key(self) -> str:
        """Return a name for another model; the same in the same order after a new start."""
        return f"model-{next(self._model_numbers)}"

    def submit(
        self,
        command: Command,
        *,
        deadline_s: float | None = None,
        finish: Finish | None = None,
        hold: bool = False,
    ) -> "Future[Any]":
        """Accept a command and return its future; commands are done in the order of acceptance.

        `finish` makes the result of the value and the names of what is trained.  With `hold` the
        result can be had again, by the command's tag, until `confirm`: by a driver that opens this
        one's journal (`adopted`).  What changes nothing is in no journal, and never held: submit
        it again after a death.  Waits while `max_queued` commands wait.

        Raises ConfigError for what cannot travel, or is held without a tag of its own, and
        BusError if the command cannot be noted or the driver has given up; then it is not done.
        """
        if deadline_s is not None and not 0 < deadline_s < FOREVER_S:
            raise ConfigError(f"a timeout must be in (0, {FOREVER_S:g}) seconds: {deadline_s}")
        payload = encode(command)
        if len(payload) + 64 > self.config.max_message_bytes:
            raise BusError(
                f"a message must have at most {self.config.max_message_bytes} bytes: "
                f"{len(payload)}",
                hint="send smaller batches, or raise max_message_bytes on both ends",
            )
        while True:
            with self.state:
                self.state.wait_for(self._has_room)
            with self.order:  # who waits for room must not keep the supervisor from sending
                if self._has_room():
                    self._check_open()
                    while self._soon:
                        self.accept(self._soon.popleft())
                    return self.accept(command, payload, deadline_s, finish, hold=hold)

    def confirm(self, tag: str) -> None:
        """Say that the result of a command that was held is kept, or not wanted; idempotent.

        Any thread may call it; it waits neither for ranks nor for the disk.
        """
        self.outstanding.confirm(tag)

    def _has_room(self) -> bool:
        return len(self.outstanding.pending) < self.config.max_queued or self.is_over

    def accept(
        self,
        command: Command,
        payload: bytes | None = None,
        deadline_s: float | None = None,
        finish: Finish | None = None,
        *,
        hold: bool = False,
    ) -> "Future[Any]":
        """Number, note and send a command; who calls holds `order`.  Raises BusError."""
        payload = encode(command) if payload is None else payload
        name = type(command).__name__
        with self.state:
            if not isinstance(command, Stop | RestoreSnapshot):  # which end it
                self._check_open()
            seq, limit = self.last_seq + 1, deadline_s or command.deadline_s
            if is_redone(command):
                if hold:
                    self.outstanding.check_tag(command.tag)
                self.history.accept(seq, payload, limit, held=hold)
                if hold:
                    self.outstanding.tags[command.tag] = seq
            self.last_seq = seq
            if isinstance(command, Save) and command.background:
                self._has_saved = True
                self.outstanding.saves_in_background(seq)
            future = self.outstanding.new_future(lambda: self._cancel(seq))
            pending = Pending(seq, name, payload, limit, future, finish or value_alone)
            self.outstanding.pending[seq] = pending
        self.observers.tell(Event("accepted", seq, name, num_bytes=len(payload)))
        self._send(pending)
        return future

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
        with self.state:
            acknowledged = self.outstanding.acknowledged(self.last_seq)
        job = Job(pending.seq, pending.deadline_s, pending.payload, acknowledged)
        try:
            self.link.send(Kind.COMMAND, job.pack())
        except BusError as error:
            logger.debug("command %d waits for the ranks: %s", pending.seq, error.message)

    def _cancel(self, seq: int) -> bool:
        with self.state:
            pending = self.outstanding.pending.get(seq)
            if pending is None:
                return False
            answer = pending.answer = pending.answer or Answer()
        try:
            self.link.send(Kind.CANCEL, SEQ.pack(seq))
        except BusError:
            return False
        return answer.wait()

    def _reach(self, address: Address, timeout_s: float) -> Link:
        def check() -> None:
            if (failure := self.ranks.failure()) is not None:
                said = self.ranks.output()
                raise RankError(f"ranks ended while they started: {failure}\n{said}")
            if self._closing:
                raise BusError("this driver is closed")

        return reach(address, self.config, self.history.session, timeout_s, check)

    def reconnect(self, timeout_s: float) -> None:
        """Have the ranks started again, and tell them what they knew.  Raises BusError."""
        self.link = self._reach(self.ranks.start(), timeout_s)
        self._tell_again(self.link)

    def _tell_again(self, link: Link) -> None:
        """Bring ranks to where they were, if they are new, and send what they have not answered."""
        known, outstanding = link.welcome.last_seq, self.outstanding
        with self.state:
            if link.welcome.epoch != self.history.epoch:
                self.history.forget_expected()
                self.history.note_epoch(link.welcome.epoch)
            again = told_again(self.history, known)
            self.last_seq = max(self.last_seq, known)
        outstanding.forget_gone(known)
        with self.state:
            waiting = {p.seq: (p.deadline_s, p.payload) for p in outstanding.pending.values()}
            first = {seq for seq in waiting if not self.history.has_ended(seq)}
            outstanding.replayed = again.keys() - first
            acknowledged = outstanding.acknowledged(self.last_seq)
        link.listen(outstanding.on_reply, outstanding.on_cancelled)
        try:
            for seq, (deadline_s, payload) in sorted((again | waiting).items()):
                link.send(Kind.COMMAND, Job(seq, deadline_s, payload, acknowledged).pack())
        except BusError as error:  # another loss, which the supervisor sees and counts
            logger.debug("the ranks did not hear all: %s", error.message)
            link.close()

    def give_up(self, error: MegatrainError) -> None:
        """Do nothing from now on: everything that waits fails with this error."""
        logger.error("the driver gives up: %s", error)
        with self.state:
            self._broken = error
            self.state.notify_all()
        self.outstanding.fail_all(lambda pending: error)
        self.link.close()
        self.ranks.close()

    def close(self) -> None:
        """End the ranks that it started, or leave the others; idempotent.

        Commands that wait are given up with CancelledCommandError, and ranks that do one are ended
        in the middle of it; otherwise what is saved in the background is waited for.
        """
        if os.getpid() != self._pid:
            return  # a child that was forked: the ranks are its parent's
        with self.state:
            if self._closing:
                return
            self._closing = True
            is_busy = bool(self.outstanding.pending)
            self.state.notify_all()
        if is_busy:
            self._give_up_pending()
        self.supervisor.join()
        if self._broken is None and not is_busy:  # the end would wait behind what is given up
            self._say_goodbye()
        atexit.unregister(self.close)
        self.link.close()
        self.ranks.close(orderly=not is_busy)
        self.outstanding.drain()
        self.history.close()
        self.telemetry.close()

    def _give_up_pending(self) -> None:
        """Cancel what has not begun; what ranks that go on are doing is left to them."""
        pending = sorted(self.outstanding.pending, reverse=True)
        left = [seq for seq in pending if not self.history.has_ended(seq)]
        if isinstance(self.ranks, RanksAt):
            left = [seq for seq in left if not self._cancel(seq)]
        else:  # these ranks end, and nobody is to do it again
            with self.state:
                for seq in left:
                    self.history.drop(seq)
        self.outstanding.fail_all(
            lambda pending: CancelledCommandError(
                f"the driver was closed before {pending.name} was done",
                hint="ranks that go on may do it all the same",
            )
        )

    def _say_goodbye(self) -> None:
        if self.link.error is not None:
            return  # nobody hears it: the ranks were lost, and did not start again yet
        command: Command = Stop()
        if isinstance(self.ranks, RanksAt):
            if not self.history.is_temporary:
                return  # a driver with this journal may come back
            command = RestoreSnapshot(directory=None)
        try:
            with self.order:
                said = self.accept(command)
            said.result(timeout=FILES_S if self._has_saved else STOP_S)
        except (MegatrainError, TimeoutError) as error:
            logger.debug("the ranks did not hear the end: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
