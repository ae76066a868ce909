"""What ranks would have to be told again: commands since the last whole snapshot, and no others."""

import errno
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.bus.history import History, pack_accepted, unpack_accepted
from megatrain.bus.journal import Entry, Record
from megatrain.config.bus import RecoveryPolicy
from megatrain.errors import BusError

Open = Callable[..., History]


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Open]:
    """Return a function that opens the history in one folder, after closing the one before."""
    last: list[History] = []

    def function(can_snapshot: bool = True, **policy: Any) -> History:
        for each in last:
            each.close()
        last[:] = [History(tmp_path / "j", RecoveryPolicy(**policy), can_snapshot=can_snapshot)]
        return last[0]

    yield function
    for each in last:
        each.close()


def accept(history: History, *numbers: int) -> None:
    for seq in numbers:
        history.accept(seq, f"command {seq}".encode(), 60.0)
        history.last_seq = seq


def snapshot(history: History, seq: int, ranks: int = 2) -> None:
    """Begin a snapshot and write its files."""
    folder = Path(history.directory(seq))
    history.expect(seq, ranks)
    folder.mkdir()
    for rank in range(ranks):
        (folder / f"rank-{rank:05d}.json").write_text(json.dumps(seq))


def test_what_was_accepted_is_known_after_a_new_start(reopen: Open) -> None:
    history = reopen()
    session = history.session
    accept(history, 1, 2, 5)
    history.done(1)
    history.note_epoch("an epoch")
    again = reopen()
    assert again.session == session
    assert again.epoch == "an epoch"
    assert again.last_seq == 5
    assert list(again.undone) == [2, 5]
    assert again.commands() == {seq: (60.0, f"command {seq}".encode()) for seq in (1, 2, 5)}


def test_what_was_dropped_is_never_done_again(reopen: Open) -> None:
    history = reopen()
    accept(history, 1, 2, 3)
    history.drop(2)
    history.drop(9)
    assert list(history.commands()) == [1, 3]
    again = reopen()
    assert list(again.commands()) == [1, 3]
    assert list(again.undone) == [1, 3]
    snapshot(again, 4)
    assert again.settle() == 4
    assert list(reopen().commands()) == []


def test_a_drop_on_a_full_disk_holds_while_the_driver_lives(
    reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = reopen()
    accept(history, 1, 2)

    def full(*anything: Any, **options: Any) -> None:
        raise BusError("the disk is full")

    monkeypatch.setattr(history._journal, "append", full)
    history.drop(1)
    assert list(history.commands()) == [2]


def test_a_command_that_cannot_be_noted_is_not_accepted(
    reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = reopen()
    accept(history, 1)
    with monkeypatch.context() as patched:

        def full(*anything: Any, **options: Any) -> None:
            raise BusError("the disk is full")

        patched.setattr(history._journal, "append", full)
        with pytest.raises(BusError, match="full"):
            history.accept(2, b"x", 60.0)
    assert list(history.commands()) == [1]
    assert list(reopen().commands()) == [1]


def test_a_snapshot_is_due_after_so_many_commands(reopen: Open) -> None:
    history = reopen(snapshot_every_commands=3)
    for seq, due in ((1, False), (2, False), (3, True)):
        accept(history, seq)
        assert history.is_due() is due
    history.drop(3)
    assert not history.is_due()


def test_a_snapshot_is_due_after_so_long_if_anything_has_changed(
    reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = reopen(snapshot_every_s=100.0)
    start = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: start + 1000.0)
    assert not history.is_due()
    accept(history, 1)
    assert not history.is_due()
    monkeypatch.setattr(time, "monotonic", lambda: start + 1100.0)
    assert history.is_due()


def test_after_a_new_start_the_commands_in_the_journal_count(reopen: Open) -> None:
    accept(reopen(), 1, 2, 3)
    assert reopen(snapshot_every_commands=3).is_due()


def test_none_is_due_where_none_can_be_taken_or_one_is_awaited(reopen: Open) -> None:
    history = reopen(can_snapshot=False, snapshot_every_commands=1)
    accept(history, 1)
    assert not history.is_due()
    history = reopen(snapshot_every_commands=1)
    accept(history, 2)
    assert history.is_due()
    history.expect(3, 1)
    assert not history.is_due()


def test_a_snapshot_counts_when_all_ranks_have_written_it(reopen: Open) -> None:
    history = reopen()
    accept(history, 1, 2)
    snapshot(history, 3, ranks=1)
    history.expect(3, 2)
    accept(history, 4)
    assert history.settle() is None
    assert history.snapshot is None
    (history.folder / "snapshot-3" / "rank-00001.json").touch()
    assert history.settle() == 3
    assert history.settle() is None
    assert list(history.commands()) == [4]


def test_compaction_keeps_what_is_needed_and_survives_a_new_start(reopen: Open) -> None:
    history = reopen(snapshot_every_commands=2)
    history.note_epoch("e")
    accept(history, 1, 2)
    snapshot(history, 3)
    accept(history, 4, 5, 6)
    history.done(4)
    history.drop(5)
    assert history.settle() == 3
    session = history.session
    for each in (history, reopen(snapshot_every_commands=2)):
        assert each.snapshot == (3, str(each.folder / "snapshot-3"))
        assert (each.session, each.epoch) == (session, "e")
        assert list(each.commands()) == [4, 6]
        assert each.is_due()
    again = reopen()
    assert list(again.undone) == [6]
    assert again.last_seq == 6
    assert not any(record.payload == b"command 1" for record in again._journal.read())


def test_the_snapshot_before_is_removed_once_the_next_is_whole(reopen: Open) -> None:
    history = reopen()
    for seq in (2, 4):
        accept(history, seq - 1)
        snapshot(history, seq)
        assert history.settle() == seq
    left = [each.name for each in history.folder.glob("snapshot-*")]
    assert left == ["snapshot-4"]


def test_files_of_a_snapshot_that_was_never_whole_do_not_count_for_a_later_one(
    reopen: Open,
) -> None:
    history = reopen()
    accept(history, 1)
    snapshot(history, 3)  # and the driver dies
    history = reopen()
    accept(history, 2)
    history.expect(3, 2)
    assert history.settle() is None
    assert list(history.commands()) == [1, 2]


def test_a_snapshot_whose_ranks_are_gone_is_forgotten(reopen: Open) -> None:
    history = reopen(snapshot_every_commands=1)
    accept(history, 1)
    snapshot(history, 2)
    history.forget_expected()
    assert history.settle() is None
    assert history.is_due()
    assert not list(history.folder.glob("snapshot-*"))
    assert list(history.commands()) == [1]


def test_a_snapshot_that_does_not_come_is_given_up(
    reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = reopen(snapshot_every_commands=1)
    accept(history, 1)
    history.expect(2, 1)
    monkeypatch.setattr("megatrain.bus.history.WRITTEN_S", -1.0)
    assert history.settle() is None
    assert history.is_due()


def test_a_full_disk_while_the_journal_is_shortened_loses_nothing(
    reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = reopen()
    accept(history, 1, 2)
    snapshot(history, 3)
    accept(history, 4)

    def full(records: list[Record]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(history._journal, "compact", full)
        assert history.settle() is None
    assert history.snapshot is None
    assert list(history.commands()) == [1, 2, 4]
    assert list(reopen().commands()) == [1, 2, 4]


def test_how_a_command_ended_is_known_after_a_new_start(reopen: Open) -> None:
    history = reopen()
    accept(history, 1, 2, 3)
    history.done(1)
    history.done(2, failed=True)
    for each in (history, reopen()):
        assert each.is_as_before(1, failed=False)
        assert not each.is_as_before(1, failed=True)
        assert each.is_as_before(2, failed=True)
        assert not each.is_as_before(2, failed=False)
        assert each.is_as_before(3, failed=True)
        assert each.is_as_before(3, failed=False)


def test_a_temporary_history_goes_with_its_driver() -> None:
    history = History(None, RecoveryPolicy(), can_snapshot=True)
    assert history.is_temporary
    accept(history, 1)
    assert list(history.commands()) == [1]
    history.close()
    assert not history.folder.exists()


@given(st.floats(1e-3, 1e9), st.binary())
def test_deadline_and_command_are_kept_together(deadline_s: float, payload: bytes) -> None:
    found, again = unpack_accepted(pack_accepted(deadline_s, payload))
    assert again == payload
    assert abs(found - deadline_s) <= 1e-3 * max(1.0, deadline_s)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["accept", "done", "drop", "snapshot", "reopen", "forget"])))
def test_whatever_happens_what_is_open_is_told_again(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("j")
    history = History(folder, RecoveryPolicy(), can_snapshot=True)
    wanted: list[int] = []
    seq = 0
    for step in steps:
        match step:
            case "accept":
                seq += 1
                accept(history, seq)
                wanted.append(seq)
            case "done" if wanted:
                history.done(wanted[0])
            case "drop" if wanted:
                history.drop(wanted.pop())
            case "snapshot":
                seq += 1
                snapshot(history, seq)
                assert history.settle() == seq
                wanted = []
            case "forget":
                seq += 1
                snapshot(history, seq)
                history.forget_expected()
            case "reopen":
                history.close()
                history = History(folder, RecoveryPolicy(), can_snapshot=True)
        assert list(history.commands()) == wanted
    entries = {record.entry for record in history._journal.read()}
    assert Entry.SESSION in entries
    history.close()
