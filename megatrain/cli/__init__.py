"""The `megatrain` command.  Importing it imports no torch, so that `--help` answers at once."""

import argparse
import signal
import sys
from collections.abc import Sequence

from megatrain import __version__
from megatrain.cli import doctor, keys, sampler, worker
from megatrain.cli.bench import command as bench
from megatrain.cli.convert import command as convert
from megatrain.cli.data import command as data
from megatrain.cli.models import command as models
from megatrain.cli.plan import command as plan
from megatrain.cli.quickstart import command as quickstart
from megatrain.cli.serve import command as serve
from megatrain.cli.top import command as top
from megatrain.cli.train import command as train
from megatrain.errors import MegatrainError

COMMANDS = (
    *(quickstart, train, serve, keys, sampler, worker, top),
    *(plan, data, models, convert, bench, doctor),
)
"""Modules with add_parser(subparsers); each sets `run`, which returns the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; a user's mistake is one line, not a traceback."""
    parser = argparse.ArgumentParser(
        prog="megatrain",
        description="Megatron-first LoRA training: Hugging Face in, PEFT out, on any machine.",
    )
    parser.add_argument("--version", action="version", version=f"megatrain {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(arguments)
    # Ended by a signal, a command must still end the ranks that it started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        status: int = args.run(args)
    except (MegatrainError, OSError) as error:
        sys.stderr.write(f"megatrain {args.command}: {type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"megatrain {args.command}: interrupted\n")
        return 130
    return status
