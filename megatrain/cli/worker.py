"""`megatrain worker`: ranks that do what a driver on this host or another one says.

Run it under torchrun, which starts all ranks again when one is lost:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        --max-restarts 3 --no-python megatrain worker --listen tcp://HOST:29500 --token-file FILE

Rank 0 listens; a script drives them with megatrain.initialize(mode="driver", address=...).
"""

import argparse
import os
from pathlib import Path
from typing import Any

from megatrain.parallel.layout import DeviceMesh

AXES = {
    "tp": "tensor",
    "pp": "pipeline",
    "cp": "context",
    "ep": "expert",
    "etp": "expert tensor",
    "vpp": "virtual pipeline",
    "fsdp": "sharded data",
}

OPTIONS = (
    "token_file",
    "certificate",
    "private_key",
    "heartbeat_timeout_s",
    "connect_timeout_s",
    "max_message_bytes",
)
"""Of BusConfig, as the command line calls them."""


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "worker",
        help="ranks that a driver elsewhere commands",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--listen",
        required=True,
        metavar="ADDRESS",
        help="tcp://HOST:PORT or unix:/path",
    )
    for axis, what in AXES.items():
        parser.add_argument(
            f"--{axis}", type=int, default=1, metavar="N", help=f"{what} parallel ranks (default 1)"
        )
    parser.add_argument(
        "--dp", type=int, metavar="N", help="data parallel ranks (default: what is left)"
    )
    parser.add_argument("--seed", type=int, default=42, help="decides adapters and dropout")
    parser.add_argument("--platform", default="auto", choices=("auto", "cpu", "cuda", "npu"))
    parser.add_argument(
        "--timeout-s", type=float, default=1800.0, metavar="S", help="bound of a collective"
    )
    _add_connection(parser)
    parser.set_defaults(run=run)


def _add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="the secret of both ends (default: ~/.config/megatrain/token, made here)",
    )
    parser.add_argument(
        "--certificate", type=Path, metavar="PEM", help="encrypt connections, with --private-key"
    )
    parser.add_argument("--private-key", type=Path, metavar="PEM")
    parser.add_argument("--heartbeat-timeout-s", type=float, metavar="S")
    parser.add_argument("--connect-timeout-s", type=float, metavar="S")
    parser.add_argument("--max-message-bytes", type=int, metavar="N")


def run(args: argparse.Namespace) -> int:
    """Be one rank until a driver says stop; return the exit status.

    Raises ConfigError or LayoutError, before any other rank is contacted, for options that cannot
    work.
    """
    from megatrain.bus.address import Address
    from megatrain.bus.rank_options import RankOptions
    from megatrain.bus.token import listening_token
    from megatrain.errors import ConfigError

    config = _bus_config(args)
    if os.environ.get("RANK", "0") == "0":
        listening_token(Address.parse(args.listen), config)
    if (config.certificate is None) != (config.private_key is None):
        raise ConfigError("--certificate and --private-key go together")
    options = RankOptions(
        listen=args.listen,
        mesh=_mesh(args),
        seed=args.seed,
        platform=args.platform,
        timeout_s=args.timeout_s,
        bus=config,
    )
    from megatrain.bus.rank_job import run as run_rank

    return run_rank(options)


def _bus_config(args: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from megatrain.config.bus import BusConfig
    from megatrain.errors import ConfigError

    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    try:
        return BusConfig(**given)
    except ValidationError as error:
        raise ConfigError(f"megatrain worker does not take these options: {error}") from error


def _mesh(args: argparse.Namespace) -> DeviceMesh:
    sizes = {f"{axis}_size": getattr(args, axis) for axis in AXES}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return DeviceMesh.from_sizes(dp_size=args.dp, world_size=world, **sizes)
