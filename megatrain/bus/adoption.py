"""What a driver takes over from the one before it, whose journal it has opened.  No torch."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from megatrain.bus.codec import decode, encode
from megatrain.bus.commands import Command, RestoreSnapshot, Save
from megatrain.bus.history import History
from megatrain.bus.outstanding import Outstanding
from megatrain.bus.pending import Pending, value_alone

Undone = dict[int, Future[Any]]
Adopted = dict[str, Future[Any]]


def adopt(
    history: History, outstanding: Outstanding, known: int, cancel: Callable[[int], bool]
) -> tuple[Undone, Adopted]:
    """Make futures for what the driver before had not heard of, or had not had confirmed.

    `known` is the last number that the ranks have heard: what is after it they are told again.
    Returns the futures of what was not answered, by number, and of what has a tag, by tag.
    Raises BusError for a journal whose commands are another version's.
    """
    undone: Undone = {}
    adopted: Adopted = {}
    for seq, (deadline_s, payload) in sorted(history.commands(held=True).items()):
        command: Command = decode(payload)
        if isinstance(command, Save) and command.background and history.is_redone(seq):
            outstanding.saves_in_background(seq)
        is_held, is_undone = seq in history.held, seq in history.undone
        if not (is_undone or is_held or (command.tag and seq > known)):
            continue
        name = type(command).__name__
        future = outstanding.new_future(_canceller(cancel, seq) if is_undone else _too_late)
        outstanding.pending[seq] = Pending(seq, name, payload, deadline_s, future, value_alone)
        if is_undone:
            undone[seq] = future
        if is_held:
            outstanding.tags[command.tag] = seq
        if command.tag:
            adopted[command.tag] = future
    return undone, adopted


def _canceller(cancel: Callable[[int], bool], seq: int) -> Callable[[], bool]:
    return lambda: cancel(seq)


def _too_late() -> bool:
    """What was done once is done again in its place, or all after it would differ."""
    return False


def told_again(history: History, known: int) -> dict[int, tuple[float, bytes]]:
    """Return deadlines and encoded commands that make ranks what they were, by number."""
    found: dict[int, tuple[float, bytes]] = {}
    if history.snapshot is not None:
        seq, directory = history.snapshot
        command = RestoreSnapshot(directory=directory)
        found[seq] = (command.deadline_s, encode(command))
    return {seq: each for seq, each in (found | history.commands()).items() if seq > known}
