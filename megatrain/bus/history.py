"""What a driver's ranks would have to be told to be again what they are.  No torch.

A snapshot, if there is one, and the commands since then, in a journal on the disk.
"""

import contextlib
import logging
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from megatrain.bus.journal import Entry, Journal, Record
from megatrain.config.bus import RecoveryPolicy
from megatrain.errors import BusError

logger = logging.getLogger(__name__)


_FAILED = b"failed"
_ACCEPTED = (Entry.COMMAND, Entry.HELD)
WRITTEN_S = 600.0
"""Seconds that ranks get to write a snapshot."""


class History:
    """The journal and the snapshots of one driver."""

    def __init__(self, folder: Path | None, policy: RecoveryPolicy, *, can_snapshot: bool) -> None:
        """Open the journal in `folder`; None is a temporary one.

        Without `can_snapshot` the ranks may not see the folder, and none is ever taken.
        Raises BusError or CheckpointError for a journal that cannot be used.
        """
        self._temporary = folder is None
        self.folder = Path(
            tempfile.mkdtemp(prefix="megatrain-journal-") if folder is None else folder
        )
        self._policy, self._can_snapshot = policy, can_snapshot
        self._journal = Journal(self.folder)
        self.session = secrets.token_hex(8)
        """Names this driver to the ranks; the same after it was started anew."""
        self.epoch = ""
        """Of the ranks that have done what the journal says."""
        self.last_seq = 0
        self.snapshot: tuple[int, str] | None = None
        """Number and folder of the last whole snapshot."""
        self._awaited: tuple[int, str, int, float] | None = None
        """Number, folder and files of the snapshot that is being written, and since when."""
        self._open: dict[int, None] = {}
        """Commands since the snapshot that must be done again, in order."""
        self.undone: dict[int, None] = {}
        """Those of them whose reply had not come when the driver before this one ended."""
        self._ends: dict[int, bytes] = {}
        """How those that were answered had ended: failed, or with a digest of what they read."""
        self.held: dict[int, None] = {}
        """Commands whose results the caller has not confirmed; no snapshot drops them."""
        self._in_a_hurry = False
        """Whether a snapshot is due at once."""
        self._changed_at: float | None = None
        for record in self._journal.records:
            self._replay(record)
        if self._open:
            self._changed_at = time.monotonic()
        self._remove_others()
        if not self._journal.records:
            self._append(Entry.SESSION, 0, self.session.encode())

    def _replay(self, record: Record) -> None:
        self.last_seq = max(self.last_seq, record.seq)
        match record.entry:
            case Entry.COMMAND:
                self._open[record.seq] = self.undone[record.seq] = None
            case Entry.HELD:
                self._open[record.seq] = self.undone[record.seq] = self.held[record.seq] = None
            case Entry.CONFIRMED:
                self.held.pop(record.seq, None)
            case Entry.DONE:
                self.undone.pop(record.seq, None)
                self._ends[record.seq] = record.payload
            case Entry.DROPPED:
                self.undone.pop(record.seq, None)
                self._drop(record.seq)
            case Entry.SNAPSHOT:
                self.snapshot = record.seq, record.payload.decode()
            case Entry.SESSION:
                self.session = record.payload.decode()
            case Entry.EPOCH:
                self.epoch = record.payload.decode()

    def _append(self, entry: Entry, seq: int, payload: bytes = b"", *, sync: bool = True) -> None:
        self._journal.append(entry, seq, payload, sync=sync and not self._temporary)

    def accept(self, seq: int, payload: bytes, deadline_s: float, *, held: bool = False) -> None:
        """Note a command that must be done again if ranks start anew.

        With `held` its result is wanted until it is confirmed.  It is on the disk when this
        returns.  Raises BusError, with nothing noted, if it cannot be.
        """
        entry = Entry.HELD if held else Entry.COMMAND
        self._append(entry, seq, pack_accepted(deadline_s, payload))
        self._open[seq] = None
        if held:
            self.held[seq] = None
        if self._changed_at is None:
            self._changed_at = time.monotonic()

    def note_epoch(self, epoch: str) -> None:
        """Note which ranks do what follows."""
        self.epoch = epoch
        with contextlib.suppress(BusError):  # a full disk: ranks say themselves what they know
            self._append(Entry.EPOCH, 0, epoch.encode())

    def done(self, seq: int, *, failed: bool = False, source: str = "") -> None:
        """Note that a reply has come; `source` is a digest of the files that it had read.

        Such files may be others when the command is done again: a snapshot is due at once then.
        """
        if seq in self._open:
            self._ends[seq] = _FAILED if failed else source.encode()
            self._in_a_hurry |= bool(source)
            with contextlib.suppress(Exception):  # it is a hint: without it, it is done again
                self._append(Entry.DONE, seq, self._ends[seq], sync=False)

    def confirm(self, seq: int) -> None:
        """Note that the caller has kept the result of a command that was held."""
        if seq in self.held:
            with contextlib.suppress(Exception):  # a hint: without it, it is confirmed once more
                self._append(Entry.CONFIRMED, seq, sync=False)
            del self.held[seq]

    def has_ended(self, seq: int) -> bool:
        """Tell whether a command since the snapshot was answered, by these ranks or others."""
        return seq in self._ends

    def is_redone(self, seq: int) -> bool:
        """Tell whether ranks that start anew are told a command."""
        return seq in self._open

    def is_as_before(self, seq: int, *, failed: bool, source: str = "") -> bool:
        """Tell whether a command that was done again has ended as it did the first time."""
        if self.snapshot is not None and seq == self.snapshot[0]:
            return not failed
        end = _FAILED if failed else source.encode()
        return self._ends.get(seq, end) == end

    def drop(self, seq: int) -> None:
        """Note that a command was cancelled or given up, or that its effect stays for good: it is
        never done again.
        """
        if self._drop(seq):
            try:
                self._append(Entry.DROPPED, seq)
            except BusError as error:  # it is so all the same, as long as this driver lives
                logger.error("that command %d is dropped could not be noted: %s", seq, error)

    def _drop(self, seq: int) -> bool:
        if seq not in self._ends:  # otherwise it was done, and its result may still be wanted
            self.held.pop(seq, None)
        return self._open.pop(seq, 0) is None

    def commands(self, *, held: bool = False) -> dict[int, tuple[float, bytes]]:
        """Return deadlines and encoded commands since the snapshot, from the disk, by number.

        With `held`, also those that ranks are not told again, and whose result is wanted.
        """
        wanted = self._open | self.held if held else self._open
        return {
            record.seq: unpack_accepted(record.payload)
            for record in self._journal.read()
            if record.entry in _ACCEPTED and record.seq in wanted
        }

    def is_due(self) -> bool:
        """Tell whether it is time for a snapshot."""
        if not self._can_snapshot or self._awaited is not None or self._changed_at is None:
            return False
        age = time.monotonic() - self._changed_at
        many = len(self._open) >= self._policy.snapshot_every_commands
        return self._in_a_hurry or many or age >= self._policy.snapshot_every_s

    def directory(self, seq: int) -> str:
        """Return where a snapshot of this number belongs."""
        return str((self.folder / f"snapshot-{seq}").absolute())

    def expect(self, seq: int, num_ranks: int) -> None:
        """Wait for the files of a snapshot that all ranks have begun to write."""
        self._in_a_hurry = False
        self._awaited = seq, self.directory(seq), num_ranks, time.monotonic()

    def forget_expected(self) -> None:
        """The ranks that were writing a snapshot are gone."""
        if self._awaited is not None:
            shutil.rmtree(self._awaited[1], ignore_errors=True)
        self._awaited = None

    def settle(self) -> int | None:
        """If the snapshot that is awaited is whole, drop what was before it, and return its number.

        Not before every result is confirmed that was held before it: ranks which start anew must
        give it again until then.  A disk that is full leaves everything as it was.
        """
        if self._awaited is None:
            return None
        seq, directory, num_ranks, since = self._awaited
        if len(list(Path(directory).glob("rank-*.json"))) < num_ranks:
            if time.monotonic() - since > WRITTEN_S:
                logger.warning("a snapshot was not written in time: %s", directory)
                self.forget_expected()
            return None
        if any(each < seq for each in self.held):
            return None
        try:
            self._compact(seq, directory)
        except OSError as error:
            logger.warning("the journal could not be shortened: %s", error)
            self.forget_expected()
            return None
        self._awaited = None
        return seq

    def _compact(self, seq: int, directory: str) -> None:
        still_open = {each: None for each in self._open if each > seq}
        kept = [
            record
            for record in self._journal.read()
            if record.seq > seq
            and (record.entry not in _ACCEPTED or record.seq in still_open | self.held)
        ]
        head = [
            Record(Entry.SESSION, 0, self.session.encode()),
            Record(Entry.EPOCH, 0, self.epoch.encode()),
            Record(Entry.SNAPSHOT, seq, directory.encode()),
        ]
        self._journal.compact([*head, *kept])
        self.snapshot, self._open = (seq, directory), still_open
        self._ends = {each: end for each, end in self._ends.items() if each > seq}
        self._changed_at = time.monotonic() if self._open else None
        self._remove_others()
        logger.info("snapshot of all up to command %d: %s", seq, directory)

    def _remove_others(self) -> None:
        """Remove snapshots that nobody will start from; one with the same number may come."""
        for each in self.folder.glob("snapshot-*"):
            if self.snapshot is None or str(each.absolute()) != self.snapshot[1]:
                shutil.rmtree(each, ignore_errors=True)

    def close(self) -> None:
        """Close the journal; a temporary one is removed."""
        self._journal.close()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def is_temporary(self) -> bool:
        """Tell whether nobody can go on from it."""
        return self._temporary


def pack_accepted(deadline_s: float, payload: bytes) -> bytes:
    """Return what the journal keeps of a command."""
    return int(deadline_s * 1000).to_bytes(8, "little") + payload


def unpack_accepted(data: bytes) -> tuple[float, bytes]:
    """Return deadline and encoded command."""
    return int.from_bytes(data[:8], "little") / 1000, data[8:]
