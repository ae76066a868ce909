"""The journal: what was accepted is there again, whatever a crash or a full disk left."""

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.bus.journal import Entry, Journal, Record
from megatrain.errors import BusError, CheckpointError

RECORDS = [
    Record(Entry.SESSION, 0, b"a session"),
    Record(Entry.COMMAND, 1, b"first"),
    Record(Entry.DONE, 1),
    Record(Entry.COMMAND, 2, bytes(range(256)) * 20),
    Record(Entry.COMMAND, 2**64 - 1, b""),
]


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    journal = Journal(folder)
    try:
        yield journal
    finally:
        journal.close()


def write(folder: Path, records: list[Record] = RECORDS) -> bytes:
    """Write a journal and return its bytes."""
    with opened(folder) as journal:
        for each in records:
            journal.append(each.entry, each.seq, each.payload)
    return (folder / "journal").read_bytes()


def test_what_was_appended_is_there_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with opened(folder) as journal:
        assert journal.records == []
        for each in RECORDS:
            journal.append(each.entry, each.seq, each.payload, sync=each.seq % 2 == 0)
        assert journal.read() == RECORDS
    assert folder.stat().st_mode & 0o777 == 0o700
    with opened(folder) as journal:
        assert journal.records == journal.read() == RECORDS
        journal.append(Entry.DROPPED, 7)
    with opened(folder) as journal:
        assert journal.records == [*RECORDS, Record(Entry.DROPPED, 7)]


def test_a_cut_at_any_byte_of_the_last_record_drops_that_record_alone(tmp_path: Path) -> None:
    last = Record(Entry.COMMAND, 3, b"the last one")
    start = len(write(tmp_path))
    whole = write(tmp_path, [last])
    for size in range(start, len(whole)):
        (tmp_path / "journal").write_bytes(whole[:size])
        with opened(tmp_path) as journal:
            assert journal.records == RECORDS
            journal.append(Entry.DONE, 9)
            assert journal.read() == [*RECORDS, Record(Entry.DONE, 9)]


@pytest.mark.parametrize("size", [1, 8, 13, 5000])
def test_space_that_a_crash_left_unwritten_at_the_end_is_dropped(tmp_path: Path, size: int) -> None:
    whole = write(tmp_path)
    (tmp_path / "journal").write_bytes(whole + bytes(size))
    with opened(tmp_path) as journal:
        assert journal.records == RECORDS


def test_a_flipped_byte_anywhere_before_the_last_record_is_refused(tmp_path: Path) -> None:
    first = [Record(Entry.COMMAND, 1, b"abc"), Record(Entry.COMMAND, 2, b"defgh")]
    end = len(write(tmp_path, first))
    whole = write(tmp_path, [Record(Entry.COMMAND, 3, b"i" * 40)])
    for place in range(end):
        damaged = bytearray(whole)
        damaged[place] ^= 0x11
        (tmp_path / "journal").write_bytes(damaged)
        with pytest.raises(CheckpointError):
            Journal(tmp_path)


def test_a_refused_journal_is_left_as_it_is_and_unlocked(tmp_path: Path) -> None:
    whole = bytearray(write(tmp_path))
    whole[30] ^= 1
    (tmp_path / "journal").write_bytes(whole)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="damaged after"):
            Journal(tmp_path)
    assert (tmp_path / "journal").read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"MT", b"something else", b"MTRJ\xff\xff\0\0"])
def test_what_is_no_journal_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(CheckpointError, match="no journal of this version"):
        Journal(tmp_path)
    assert (tmp_path / "journal").read_bytes() == content


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_random_bytes_behind_whole_records_never_change_those(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    whole = write(folder)
    (folder / "journal").write_bytes(whole + data)
    with contextlib.suppress(CheckpointError), opened(folder) as journal:
        assert journal.records == RECORDS


def test_one_process_alone_has_it_open(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatrain.bus.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(BusError, match="another driver uses the journal"):
            Journal(tmp_path)
        other.kill()
    with opened(tmp_path), pytest.raises(BusError, match="another driver"):
        Journal(tmp_path)


class FullFile:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self.room = file, room

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count: int = self._file.write(data[: self.room])
        self.room -= count
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 1, 10, 20])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, room: int) -> None:
    whole = write(tmp_path)
    with opened(tmp_path) as journal:
        full = FullFile(journal._file, room)
        journal._file = full  # type: ignore[assignment]
        for _ in range(2):
            with pytest.raises(BusError, match=r"was not accepted.*No space left") as error:
                journal.append(Entry.COMMAND, 9, b"x" * 100)
            assert "make room" in str(error.value)
            assert (tmp_path / "journal").read_bytes() == whole
        full.room = 10_000
        journal.append(Entry.COMMAND, 9, b"y")
        assert journal.read() == [*RECORDS, Record(Entry.COMMAND, 9, b"y")]


def test_a_disk_that_fails_to_keep_it_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with opened(tmp_path) as journal:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", fail)
            with pytest.raises(BusError, match="Input/output error"):
                journal.append(Entry.COMMAND, 9, b"x")
        assert (tmp_path / "journal").read_bytes() == whole
        journal.append(Entry.COMMAND, 9, b"x")
        assert len(journal.read()) == len(RECORDS) + 1


def test_a_compaction_is_made_at_once(tmp_path: Path) -> None:
    write(tmp_path)
    with opened(tmp_path) as journal:
        journal.compact(RECORDS[3:])
        assert journal.read() == RECORDS[3:]
        journal.append(Entry.DONE, 2)
    with opened(tmp_path) as journal:
        assert journal.records == [*RECORDS[3:], Record(Entry.DONE, 2)]


def test_a_compaction_on_a_full_disk_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path) as journal:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            with pytest.raises(OSError):
                journal.compact([])
        assert (tmp_path / "journal").read_bytes() == whole
        assert sorted(each.name for each in tmp_path.iterdir()) == ["journal", "lock"]
        journal.append(Entry.DONE, 2)
        assert journal.read() == [*RECORDS, Record(Entry.DONE, 2)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_real_full_disk_leaves_what_was_accepted(small_disk: Path) -> None:
    accepted = []
    with opened(small_disk) as journal:

        def fill() -> None:
            for seq in range(1, 1000):
                journal.append(Entry.COMMAND, seq, bytes(10_000))
                accepted.append(seq)

        with pytest.raises(BusError, match="was not accepted"):
            fill()
        assert 5 < len(accepted) < 30
        assert [each.seq for each in journal.read()] == accepted
        with pytest.raises(OSError):
            journal.compact([Record(Entry.COMMAND, 1, bytes(300_000))])
        assert [each.seq for each in journal.read()] == accepted
    with opened(small_disk) as journal:
        assert [each.seq for each in journal.records] == accepted
