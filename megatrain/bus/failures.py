"""Errors as they travel from rank to driver, and errors again.  No torch."""

import socket
import traceback as tracebacks

from megatrain import errors
from megatrain.bus.codec import Failure
from megatrain.errors import MegatrainError, RankError


def failure_of(error: BaseException, *, rank: int, command: str) -> Failure:
    """Return what is sent of an error that was raised on a rank."""
    is_ours = isinstance(error, MegatrainError)
    return Failure(
        kind=type(error).__name__ if is_ours else "RankError",
        message=_text(error.message if isinstance(error, MegatrainError) else _said(error)),
        hint=_text(error.hint) if isinstance(error, MegatrainError) and error.hint else None,
        rank=rank,
        host=socket.gethostname(),
        command=command,
        traceback=_text("".join(tracebacks.format_exception(error))),
    )


LONGEST = 1 << 16
"""Characters of a text in an error; of a longer one the end is kept."""


def _text(text: str) -> str:
    """Return a text that can be sent, whatever a user's error says."""
    return text[-LONGEST:].encode("utf-8", "replace").decode()


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def error_of(failure: Failure) -> MegatrainError:
    """Return the error: of its own class if megatrain raised it on purpose, RankError otherwise."""
    kind = getattr(errors, failure.kind, RankError)
    if kind is not RankError:
        error: MegatrainError = kind(failure.message, hint=failure.hint)
        if failure.traceback:
            error.add_note(f"on rank {failure.rank} ({failure.host}), in {failure.command}")
        return error
    return RankError(
        f"rank {failure.rank} on {failure.host} failed in {failure.command}: {failure.message}",
        hint=failure.hint or "the traceback is the error's `traceback`",
        rank=failure.rank,
        host=failure.host,
        command=failure.command,
        traceback=failure.traceback,
    )
