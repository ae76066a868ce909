"""Which checkpoints of a folder are complete, which is the newest, and which may go."""

import logging
import shutil
import time
import uuid
from collections.abc import Collection
from pathlib import Path

from megatrain.errors import CheckpointError, ConfigError
from megatrain.export.state.record import StateRecord, check_files, has_state, read_record

logger = logging.getLogger(__name__)

LEFT_BEHIND_S = 3600.0
"""Seconds after which a hidden folder that was being written counts as left by a killed process."""


def verify_state(checkpoint: Path) -> StateRecord:
    """Read a checkpoint's record and compare every file with it.

    Raises CheckpointError that names the file, and an older checkpoint that can be used instead.
    """
    checkpoint = Path(checkpoint).absolute()
    try:
        record = read_record(checkpoint)
        check_files(checkpoint, record)
    except CheckpointError as error:
        before = _usable_before(checkpoint)
        hint = error.hint if before is None else f"the one before is complete: {before}"
        raise CheckpointError(error.message, hint=hint) from error
    return record


def usable_state(checkpoint: Path) -> Path:
    """Return the checkpoint, or if it is damaged the newest complete one before it.

    Raises CheckpointError if there is none.
    """
    checkpoint = Path(checkpoint).absolute()
    try:
        verify_state(checkpoint)
    except CheckpointError as error:
        before = _usable_before(checkpoint)
        if before is None:
            raise
        logger.warning("%s; going on from %s", error.message, before)
        return before
    return checkpoint


def latest_state(output_dir: Path, *, skip_broken: bool = False) -> Path | None:
    """Return the checkpoint of `output_dir` that was written last; None if there is none.

    With `skip_broken`, one that was cut short or altered is passed over, with a warning; without,
    it is a CheckpointError, which names the one before.
    """
    for checkpoint in _newest_first(Path(output_dir)):
        try:
            verify_state(checkpoint)
        except CheckpointError as error:
            if not skip_broken:
                raise
            logger.warning("passed over %s: %s", checkpoint, error.message)
        else:
            return checkpoint
    return None


def prune(output_dir: Path, keep: int, *, spare: Collection[str] = ()) -> list[Path]:
    """Remove checkpoints with a state, but not the `keep` newest complete ones; return those gone.

    A checkpoint that is not complete is left alone, and so are those named in `spare`: the best,
    say.  What a killed process left half written is removed after an hour.  For one process.
    Raises ConfigError unless `keep` is at least 1.
    """
    if keep < 1:
        raise ConfigError(f"at least one checkpoint must be kept: keep={keep}")
    complete = [
        path
        for path in _newest_first(Path(output_dir))
        if path.name not in spare and _is_complete(path)
    ]
    for path in complete[keep:]:
        _remove(path)
    for path in Path(output_dir).glob(".*.partial"):
        if time.time() - _touched_at(path) > LEFT_BEHIND_S:
            shutil.rmtree(path, ignore_errors=True)
    return complete[keep:]


def _usable_before(checkpoint: Path) -> Path | None:
    """Return the newest complete checkpoint that was written before this one, beside it."""
    others = _newest_first(checkpoint.parent)
    places = [i for i, path in enumerate(others) if path.name == checkpoint.name]
    for path in others[places[0] + 1 :] if places else others:
        if _is_complete(path, contents=True):
            return path
    return None


def _newest_first(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    found = [p for p in output_dir.iterdir() if not p.name.startswith(".") and has_state(p)]
    return sorted(found, key=_written_at, reverse=True)


def _written_at(checkpoint: Path) -> tuple[float, str]:
    try:
        return read_record(checkpoint).saved_at, checkpoint.name
    except CheckpointError:
        return (checkpoint / "state" / "state.json").stat().st_mtime, checkpoint.name


def _is_complete(checkpoint: Path, *, contents: bool = False) -> bool:
    try:
        check_files(checkpoint, read_record(checkpoint), contents=contents)
    except CheckpointError:
        return False
    return True


def _touched_at(folder: Path) -> float:
    """Return when something in it was last changed, in seconds; now, if it goes while we look.

    A checkpoint that is written in the background is renamed into place at any moment.
    """
    try:
        return max(p.stat().st_mtime for p in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return time.time()


def _remove(checkpoint: Path) -> None:
    """Remove a folder so that it is whole, or not there under its name, at any moment."""
    hidden = checkpoint.parent / f".{checkpoint.name}.{uuid.uuid4().hex}.partial"
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)
