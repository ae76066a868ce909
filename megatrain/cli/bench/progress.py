"""What every benchmark's command says while it runs, and a look at the file for its figures."""

import sys
import time
from pathlib import Path

from megatrain.errors import ConfigError


class Progress:
    """Says each phase on a line of standard error, with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        seconds = time.monotonic() - self._start
        print(f"{seconds:6.1f} s  {text}", file=sys.stderr, flush=True)


def check_file(out: Path | None) -> None:
    """Raise ConfigError unless a file can be written there."""
    if out is not None and (out.is_dir() or not out.resolve().parent.is_dir()):
        raise ConfigError(f"--out must be a file in a directory that exists: {out}")
