"""What was accepted and is not yet in a snapshot: a file that is only appended to.  No torch.

    file    magic "MTRJ" | u32 version | records
    record  u32 length of the payload | u32 CRC-32 of kind and payload | u8 kind
            | u32 CRC-32 of all before it | payload

A record is on the disk (fsync) before `append` returns.  What a crash cut short at the end was
never accepted, and is dropped when the file is opened again.
"""

import enum
import fcntl
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from megatrain.errors import BusError, CheckpointError

_MAGIC = struct.pack("<4sI", b"MTRJ", 2)
_FRONT, _CHECK = struct.Struct("<IIB"), struct.Struct("<I")
_HEAD_SIZE = _FRONT.size + _CHECK.size
_SEQ = struct.Struct("<Q")


class Entry(enum.IntEnum):
    """What a record says."""

    COMMAND = 1
    """Accepted: sequence number and encoded message."""
    DONE = 2
    """Its reply has reached the driver."""
    DROPPED = 3
    """It was cancelled or given up: it must not be done again."""
    SNAPSHOT = 4
    """All up to this number is in the snapshot in this folder."""
    SESSION = 5
    """The driver's name to the ranks."""
    EPOCH = 6
    """Which ranks do what follows."""
    HELD = 7
    """Accepted, as COMMAND; its caller wants its result until that is CONFIRMED."""
    CONFIRMED = 8
    """The caller has kept its result."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record."""

    entry: Entry
    seq: int
    payload: bytes = b""


class Journal:
    """The journal of one driver, `journal` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        """Open or create it.

        Raises BusError if another driver has it open, CheckpointError if it is no journal, or is
        damaged before its end.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = self.folder / "journal"
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise BusError(
                f"another driver uses the journal {self.folder}",
                hint="end it, or give this one a folder of its own",
            ) from error
        try:
            self.records = self._open()
        except BaseException:
            self._lock.close()
            raise

    def _open(self) -> list[Record]:
        """Return what the file holds, and leave it open behind its last whole record."""
        if not self.path.exists():
            self._replace([])
            return []
        with self.path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise CheckpointError(f"no journal of this version: {self.path}")
            records, end = _read(file.read())
        self._file = self.path.open("r+b", buffering=0)
        self._size = len(_MAGIC) + end
        self._file.truncate(self._size)
        self._file.seek(self._size)
        return records

    def append(self, entry: Entry, seq: int, payload: bytes = b"", *, sync: bool = True) -> None:
        """Add a record; with `sync`, it is on the disk when this returns.

        Raises BusError, with the file as it was, if the disk is full or fails.
        """
        data = _encode(Record(entry, seq, payload))
        try:
            written = 0
            while written < len(data):
                written += self._file.write(memoryview(data)[written:])
            if sync:
                os.fdatasync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise BusError(
                f"the command was not accepted, since the journal {self.path} cannot be written: "
                f"{error}",
                hint="make room on the disk, and call again",
            ) from error
        self._size += len(data)

    def read(self) -> list[Record]:
        """Return all records that are in the file now."""
        with self.path.open("rb") as file:
            data = file.read(self._size)
        return _read(data[len(_MAGIC) :])[0]

    def compact(self, records: list[Record]) -> None:
        """Put these records in place of all that is in the file, at once or not at all."""
        self._file.close()
        self._replace(records)

    def _replace(self, records: list[Record]) -> None:
        new = self.path.with_suffix(".new")
        try:
            with new.open("wb") as file:
                file.write(_MAGIC)
                for record in records:
                    file.write(_encode(record))
                file.flush()
                os.fsync(file.fileno())
            new.rename(self.path)
            descriptor = os.open(self.folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        finally:
            new.unlink(missing_ok=True)
            self._file = self.path.open("r+b", buffering=0)
            self._size = self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file and let others have it."""
        self._file.close()
        self._lock.close()


def _encode(record: Record) -> bytes:
    body = _SEQ.pack(record.seq) + record.payload
    kind = bytes([record.entry])
    front = _FRONT.pack(len(body), zlib.crc32(kind + body), record.entry)
    return front + _CHECK.pack(zlib.crc32(front)) + body


def _read(data: bytes) -> tuple[list[Record], int]:
    """Return the whole records and where the last of them ends.

    Raises CheckpointError for one that is damaged, and not merely cut short at the end.
    """
    records: list[Record] = []
    place = 0
    while len(data) - place >= _HEAD_SIZE:
        front, begin = data[place : place + _FRONT.size], place + _HEAD_SIZE
        if _CHECK.pack(zlib.crc32(front)) != data[place + _FRONT.size : begin]:
            if any(data[begin:]):  # otherwise the file grew, and nothing was written there
                raise _damaged(len(records))
            break
        size, check, kind = _FRONT.unpack(front)
        body = data[begin : begin + size]
        if size < _SEQ.size or len(body) < size or zlib.crc32(bytes([kind]) + body) != check:
            if len(data) > begin + size:
                raise _damaged(len(records))
            break
        if kind not in Entry:
            raise CheckpointError(f"the journal was written by another version: entry {kind}")
        records.append(Record(Entry(kind), _SEQ.unpack_from(body)[0], body[_SEQ.size :]))
        place = begin + size
    return records, place


def _damaged(whole: int) -> CheckpointError:
    return CheckpointError(
        f"a record of the journal is damaged after {whole} whole ones, and more follow",
        hint="what follows cannot be trusted; start from the last saved state in a new folder",
    )
