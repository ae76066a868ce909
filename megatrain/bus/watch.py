"""Who is dead, stuck, or alone with an error: a thread of rank 0 reads all ranks' beats.

Rank 1 watches rank 0 in the same way, so that somebody notices whoever is lost.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.bus.beat import Beat, key, patience, read_beat

logger = logging.getLogger(__name__)

WAITING = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication")
"""Files whose functions wait for other ranks: a rank with another innermost frame is the cause."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Ranks that cannot go on."""

    ranks: tuple[int, ...]
    """The cause, as far as that can be told."""
    text: str
    stacks: str = ""
    is_late: bool = False
    """They are alive, but were not done in time."""


class Watch:
    """Watches ranks until something is wrong, and says so once."""

    def __init__(
        self,
        store: Any,
        ranks: Sequence[int],
        *,
        timeout_s: float,
        lost: Callable[[Loss], None],
        heard: Callable[[list[Beat]], None] | None = None,
    ) -> None:
        """`lost` is called once, `heard` with every round of beats; both from the thread."""
        self._store, self._ranks, self._timeout_s = store, list(ranks), timeout_s
        self._lost, self._heard = lost, heard
        self._seen: dict[int, tuple[int, float]] = {}
        """By rank: its last count, and when that was new."""
        self._failed_at: float | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="bus-watch", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._stopped.set()

    def _run(self) -> None:
        interval = min(0.5, self._timeout_s / 5)
        while not self._stopped.wait(interval):
            try:
                data = self._store.multi_get([key(rank) for rank in self._ranks])
            except Exception as error:  # noqa: BLE001 - any error means that the store is gone
                if not self._stopped.is_set():
                    self._lost(Loss((), f"the ranks' store is gone: {error}"))
                return
            try:
                beats = [read_beat(each) for each in data]
            except (TypeError, ValueError) as error:
                self._lost(Loss((), f"the ranks' store holds what no rank has said: {error}"))
                return
            if loss := self.judge(beats, time.monotonic()):
                if not self._stopped.is_set():
                    self._lost(loss)
                return
            if self._heard is not None:
                self._heard(beats)

    def judge(self, beats: Sequence[Beat], now: float) -> Loss | None:
        """Return what is wrong, if anything is."""
        silent = [
            beat for beat in beats if self._silence(beat, now) > self._timeout_s * patience(beat)
        ]
        if silent:
            return Loss(
                tuple(beat.rank for beat in silent),
                "; ".join(
                    f"{who(beat)} has given no sign of life for {self._silence(beat, now):.1f} s "
                    f"(bound {self._timeout_s * patience(beat):g} s){doing(beat)}"
                    for beat in silent
                ),
            )
        return self._late(beats) or self._alone(beats, now)

    def _silence(self, beat: Beat, now: float) -> float:
        count, since = self._seen.get(beat.rank, (-1, now))
        if beat.count != count:
            self._seen[beat.rank] = beat.count, now
            return 0.0
        return now - since

    def _late(self, beats: Sequence[Beat]) -> Loss | None:
        late = [beat for beat in beats if beat.command and beat.running_s > beat.deadline_s]
        numbers = {beat.seq for beat in late}
        busy = [beat for beat in beats if beat.command and beat.seq in numbers]
        if not late or not all(beat.stack for beat in busy):
            return None  # the stacks come with the next beat, also of those that were in time yet
        cause = [beat for beat in late if not _waits(beat.stack)] or late
        return Loss(
            tuple(beat.rank for beat in cause),
            "; ".join(
                f"{who(beat)} is alive but was not done within {beat.deadline_s:g} s{doing(beat)}"
                for beat in cause
            ),
            "\n".join(f"{who(beat)}:\n{beat.stack}" for beat in cause),
            is_late=True,
        )

    def _alone(self, beats: Sequence[Beat], now: float) -> Loss | None:
        """Return the loss if a rank has failed and others do not come to hear of it."""
        failed = [beat for beat in beats if beat.failed]
        if not failed or len(failed) == len(beats):
            self._failed_at = None
            return None
        self._failed_at = self._failed_at or now
        if now - self._failed_at < self._timeout_s:
            return None
        return Loss(
            tuple(beat.rank for beat in failed),
            "; ".join(
                f"{who(beat)} failed, and the others wait for it in a collective{doing(beat)}"
                f": {beat.error}"
                for beat in failed
            ),
        )


def who(beat: Beat) -> str:
    """Return a rank with its host and process."""
    return f"rank {beat.rank} (host {beat.host}, pid {beat.pid})"


def doing(beat: Beat) -> str:
    """Return what a rank last said that it does."""
    if not beat.command:
        return f", idle after command {beat.seq}" if beat.seq else ", idle"
    return f", in {beat.command} (command {beat.seq}), phase {beat.phase}"


def _waits(stack: str) -> bool:
    """Tell whether the main thread's innermost frame is one that waits for other ranks."""
    frames = [line for line in _main_thread(stack) if line.strip().startswith("File ")]
    return bool(frames) and any(part in frames[0] for part in WAITING)


def _main_thread(stack: str) -> list[str]:
    """Return the lines of the main thread, which faulthandler prints last, innermost first."""
    return stack.strip().split("\n\n")[-1].splitlines()
