"""Commands that a driver waits for, and those that new ranks do again.  No torch."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from megatrain.bus.codec import Failure
from megatrain.bus.commands import OpenModel
from megatrain.bus.events import Event, Observers
from megatrain.bus.failures import error_of
from megatrain.bus.history import History
from megatrain.bus.pending import CommandFuture, Pending, reply_event, resolve
from megatrain.errors import (
    CancelledCommandError,
    ConfigError,
    MegatrainError,
    RankError,
    StateError,
)

WAITING = ("Save", "WaitForSave")
"""Commands that end when every save in the background before them is whole."""
DRAIN_S = 10.0
"""Seconds that callbacks of futures get when a driver is closed."""


class Outstanding:
    """Commands that were accepted and not answered.  `state` guards everything here."""

    def __init__(
        self,
        history: History,
        observers: Observers,
        state: threading.Condition,
        give_up: Callable[[MegatrainError], None],
    ) -> None:
        """`give_up` is called if ranks that started anew are not what they were."""
        self._history, self._observers, self._state = history, observers, state
        self._give_up = give_up
        self.pending: dict[int, Pending] = {}
        self.replayed: set[int] = set()
        """Commands that were done once, and that ranks which started anew have not answered."""
        self.tags: dict[str, int] = {}
        """Numbers of the commands that are held, by their tags."""
        self._background_saves: set[int] = set()
        """Saves in the background that nobody has waited for yet."""
        self._callbacks: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._call_back, name="bus-futures", daemon=True).start()

    def _call_back(self) -> None:
        while True:
            self._callbacks.get()()

    def new_future(self, cancel: Callable[[], bool]) -> CommandFuture:
        """Return a future whose callbacks run on a thread of their own, and hold up nobody."""
        return CommandFuture(cancel, self._callbacks.put)

    def drain(self) -> None:
        """Wait for callbacks of what was answered."""
        reached = threading.Event()
        self._callbacks.put(reached.set)
        if threading.current_thread().name != "bus-futures":
            reached.wait(DRAIN_S)

    def saves_in_background(self, seq: int) -> None:
        """Note that a command saves in the background: it is done again until it is known whole."""
        self._background_saves.add(seq)

    def check_tag(self, tag: str) -> None:
        """Raise ConfigError for a tag by which a command that is held could not be found."""
        if not tag:
            raise ConfigError("a command that is held must have a tag", hint="by which to find it")
        if self.tags.get(tag) in self._history.held:
            raise ConfigError(
                f"a command with the tag {tag!r} is held already",
                hint="confirm it first, or give each a tag of its own",
            )

    def confirm(self, tag: str) -> None:
        """Hear that the caller has kept the result of a command that was held."""
        with self._state:
            seq = self.tags.pop(tag, None)
            if seq is not None:
                self._history.confirm(seq)

    def acknowledged(self, last_seq: int) -> int:
        """Return the number up to which nobody needs replies again."""
        none = last_seq + 1
        return min(min(self.pending, default=none), min(self._history.held, default=none)) - 1

    def on_reply(self, seq: int, reply: dict[str, Any], num_bytes: int) -> None:
        """Resolve the future of a command."""
        failure, error = reply.get("failure"), None
        with self._state:
            pending = self.pending.pop(seq, None)
            was_done = seq in self.replayed or (pending and self._history.has_ended(seq))
            self.replayed.discard(seq)
            if was_done and not self._is_as_before(seq, reply):
                error = _mismatch(seq, failure)
            elif pending is not None and not was_done:
                self._note(pending, reply)
            self._state.notify_all()
        if error is not None:
            self._give_up(error)
            if pending is not None:
                self._fail(pending, error)
            return
        if pending is None:
            return  # done again for its effect
        if pending.answer is not None:
            pending.answer.set(False)
        self._observers.tell(reply_event(pending, reply, num_bytes))
        resolve(pending, reply)

    def _is_as_before(self, seq: int, reply: dict[str, Any]) -> bool:
        """Tell whether ranks end a command as it had ended before; what they forgot has not."""
        failed = reply.get("failure") is not None
        return bool(reply.get("forgotten")) or self._history.is_as_before(
            seq, failed=failed, source=_source(reply)
        )

    def _note(self, pending: Pending, reply: dict[str, Any]) -> None:
        """Note that the first reply to a command has come."""
        failure = reply.get("failure")
        if reply.get("forgotten"):
            return  # it was noted when it came
        if _is_cancelled(failure):
            self._history.drop(pending.seq)  # the answer to the cancellation itself was lost
            return
        if failure is not None and pending.name == OpenModel.__name__:
            # It has changed nothing, and what was in its way may be gone when it is done again.
            self._history.drop(pending.seq)
            return
        self._history.done(pending.seq, failed=failure is not None, source=_source(reply))
        if failure is None and pending.name in WAITING:
            self._saved_before(pending.seq)

    def _saved_before(self, seq: int) -> None:
        """Saves before this command are whole: doing one again would undo a later one."""
        for each in [save for save in self._background_saves if save < seq]:
            self._background_saves.discard(each)
            self._history.drop(each)

    def on_cancelled(self, seq: int, in_time: bool) -> None:
        """Hear whether a cancellation was in time."""
        with self._state:
            pending = self.pending.get(seq)
            if pending is None or pending.answer is None:
                return
            if in_time:
                self._history.drop(seq)
                del self.pending[seq]
                self._state.notify_all()
        if in_time and isinstance(pending.future, CommandFuture):
            pending.future.cancel_locally()
            self._observers.tell(Event("cancelled", seq, pending.name))
        pending.answer.set(in_time)

    def blamed(self) -> Pending | None:
        """Return the command that ranks were doing, if they were not doing an old one again."""
        with self._state:
            first = min((s for s in self.pending if not self._history.has_ended(s)), default=0)
            return None if self.replayed else self.pending.get(first)

    def drop(self, pending: Pending, error: MegatrainError) -> None:
        """Give up one command."""
        with self._state:
            if self.pending.pop(pending.seq, None) is None:
                return  # its reply has come after all
            self._history.drop(pending.seq)
            self._state.notify_all()
        self._fail(pending, error)

    def forget_gone(self, known: int) -> None:
        """Give up results that ranks which start anew cannot give: they do not do that again.

        `known` is the last number that they have heard.
        """
        with self._state:
            held = {seq for seq in self._history.held if seq > known and seq in self.pending}
            gone = [self.pending.pop(s) for s in held if not self._history.is_redone(s)]
            self._state.notify_all()
        for pending in gone:
            self._fail(
                pending,
                StateError(
                    f"{pending.name} (command {pending.seq}) was done, and its result is gone "
                    "with the ranks: it is not done again, since its effect stays",
                    hint="its effect is there; look for it, and confirm the command",
                ),
            )

    def fail_all(self, error_of_one: Callable[[Pending], MegatrainError]) -> None:
        """Give up all."""
        with self._state:
            waiting, self.pending = list(self.pending.values()), {}
        for pending in waiting:
            self._fail(pending, error_of_one(pending))

    def _fail(self, pending: Pending, error: MegatrainError) -> None:
        if not pending.future.done():
            seconds = time.monotonic() - pending.accepted_at
            event = Event("failed", pending.seq, pending.name, seconds=seconds, text=error.message)
            self._observers.tell(event)
            pending.future.set_exception(error)
        if pending.answer is not None:
            pending.answer.set(False)


def _source(reply: dict[str, Any]) -> str:
    return str(reply.get("source") or "")


def _is_cancelled(failure: Any) -> bool:
    return isinstance(failure, Failure) and failure.kind == CancelledCommandError.__name__


def _mismatch(seq: int, failure: Any) -> RankError:
    """Return the error of ranks that started anew and are not what they were."""
    said = (
        error_of(failure).message
        if isinstance(failure, Failure)
        else "it succeeded, or read other files"
    )
    return RankError(
        f"ranks that started anew could not be brought to where they were: command {seq} did not "
        f"end as it had before: {said}",
        hint="start from the last saved state",
    )
