"""`megatrain top`: ranks, commands, throughput and adapters of a running driver, live.

The driver must have been started with initialize(..., metrics_port=0), or a port of your choice.
Without an address, the one driver of yours that runs on this host is shown.  Ctrl-C ends it.
"""

import argparse
import time
from typing import TYPE_CHECKING, Any

from megatrain.errors import ConfigError

if TYPE_CHECKING:
    from megatrain.cli.top.source import Source


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "top",
        help="what a running driver and its ranks do, live",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "address",
        nargs="?",
        metavar="ADDRESS",
        help="where the driver serves its metrics, as its log says: http://127.0.0.1:PORT",
    )
    parser.add_argument("--pid", type=int, help="the driver with this process id, on this host")
    parser.add_argument(
        "--every", type=float, default=1.0, metavar="SECONDS", help="between frames (default 1)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show the driver until it ends or Ctrl-C is pressed; return 0.

    Raises ConfigError for options that cannot work, BusError if nothing answers at the start.
    """
    from rich.console import Console

    from megatrain.cli.top.lines import to_lines
    from megatrain.cli.top.screen import to_screen
    from megatrain.cli.top.source import Source, choose_address

    if not 0.1 <= args.every <= 3600:
        raise ConfigError(f"--every must be between 0.1 and 3600 seconds: {args.every:g}")
    source = Source(choose_address(args.address, args.pid))
    status, console = source.read(), Console()
    try:
        if not console.is_terminal:
            _print(
                source, status, args, lambda found: print(*to_lines(found), sep="\n", flush=True)
            )
        elif args.once:
            console.print(to_screen(status, source.url, height=None))
        else:
            _live(source, status, args.every, console)
    except KeyboardInterrupt:
        pass  # the way out
    return 0


def _print(source: "Source", status: dict[str, Any], args: argparse.Namespace, show: Any) -> None:
    """Print frames one after the other."""
    show(status)
    while not args.once:
        time.sleep(args.every)
        found = source.read_again()
        if found is None:
            print(f"the driver at {source.url} has ended", flush=True)
            return
        print()
        show(found)


def _live(source: "Source", status: dict[str, Any], every_s: float, console: Any) -> None:
    """Draw frames over each other, on the terminal's other screen."""
    from rich.live import Live

    from megatrain.cli.top.screen import to_screen

    with Live(console=console, screen=True, auto_refresh=False) as live:
        found: dict[str, Any] | None = status
        while found is not None:
            live.update(to_screen(found, source.url, height=console.height), refresh=True)
            time.sleep(every_s)
            found = source.read_again()
    console.print(f"the driver at {source.url} has ended")
