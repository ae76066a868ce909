"""Every error that a user can meet.  A message states the rule, the values and the way out.

MegatrainError
├── ConfigError (ValueError)          an option, or a combination of options, that cannot work
│   └── LayoutError                   sizes of TP, PP, CP, EP, ETP, DP that do not fit together
├── DataError (ValueError)            a batch that cannot be trained on
├── CheckpointError (ValueError)      a checkpoint that cannot be read as what it claims to be
│   └── UnknownFamilyError            no bridge for this architecture
├── ExportError (ValueError)          a file that does not hold what was trained
├── StateError (RuntimeError)         a call that does not fit what was called before
├── NonFiniteError (ArithmeticError)  a loss or gradient that is not a number
├── PlatformError (RuntimeError)      the machine lacks something that was asked for
├── BusError (ConnectionError)        driver and ranks cannot talk: refused, cut off, malformed
│   ├── RankError                     a rank failed, is lost, or is stuck; says which and where
│   ├── DeadlineError (TimeoutError)  a command was not done in time
│   └── CancelledCommandError         a queued command was cancelled, or given up
├── SamplerError (ConnectionError)    a sampler is not there, or did not do what it was told
├── NotFoundError (LookupError)       there is no such thing, or it is somebody else's
├── DeniedError (PermissionError)     a key is missing, unknown, over, or not meant for this
└── BusyError (RuntimeError)          a limit of requests is reached; later there is room

Each one is also a standard exception, so that a caller who knows nothing of megatrain can catch it.
"""


class MegatrainError(Exception):
    """Base of all errors raised on purpose.  `hint` is the way out, shown on a line of its own."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the hint when the error travels between processes."""
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(kind: type[MegatrainError], message: str, hint: str | None) -> MegatrainError:
    return kind(message, hint=hint)


class ConfigError(MegatrainError, ValueError):
    """An option, or a combination of options, cannot work."""


class LayoutError(ConfigError):
    """Sizes of TP, PP, CP, EP, ETP and DP do not fit together, the model, or the world."""


class DataError(MegatrainError, ValueError):
    """A batch cannot be trained on."""


class CheckpointError(MegatrainError, ValueError):
    """A checkpoint cannot be read as what it claims to be."""


class UnknownFamilyError(CheckpointError):
    """No bridge is registered for this architecture."""


class ExportError(MegatrainError, ValueError):
    """A written file does not hold what was trained."""


class StateError(MegatrainError, RuntimeError):
    """A call does not fit what was called before."""


class NonFiniteError(MegatrainError, ArithmeticError):
    """A loss or a gradient is not a finite number."""


class PlatformError(MegatrainError, RuntimeError):
    """The machine lacks something that was asked for."""


class BusError(MegatrainError, ConnectionError):
    """Driver and ranks cannot talk: a connection is refused or cut off, or a frame is malformed."""


class RankError(BusError):
    """A rank failed in a way that is no user's mistake, or it is lost or stuck.

    The message names rank, host and command; `traceback` is the rank's own, as text.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        rank: int | None = None,
        host: str = "",
        command: str = "",
        traceback: str = "",
    ) -> None:
        self.rank, self.host, self.command, self.traceback = rank, host, command, traceback
        super().__init__(message, hint=hint)


class DeadlineError(BusError, TimeoutError):
    """A command was not done in time."""


class CancelledCommandError(BusError):
    """A queued command was cancelled, or given up after it had failed twice the same way."""


class SamplerError(MegatrainError, ConnectionError):
    """A sampler is not there, or did not do what it was told; trying again may help."""


class NotFoundError(MegatrainError, LookupError):
    """There is no such thing, or it is somebody else's."""


class DeniedError(MegatrainError, PermissionError):
    """A key is missing, unknown, over, or not meant for this."""


class BusyError(MegatrainError, RuntimeError):
    """A limit of requests is reached; later there is room."""

    def __init__(
        self, message: str, *, hint: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        """`retry_after_s`: seconds after which it may be tried again."""
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s
