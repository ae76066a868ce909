"""`megatrain bench service`: what the service adds to the ranks' time, and what many clients get.

One client of Tinker's SDK sends a datum at a time; then many, each with an adapter of its own,
train as fast as they can.  The run ends with an error if a client of theirs does.
"""

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatrain.cli.bench.make import make_checkpoint
from megatrain.cli.bench.progress import Progress, check_file
from megatrain.cli.bench.shapes import SHAPES
from megatrain.errors import ConfigError


def add_parser(kinds: Any) -> None:
    """Declare the command and its options."""
    parser = kinds.add_parser(
        "service", help="`megatrain serve`: overhead of a call, many clients", description=__doc__
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bf16"))
    parser.add_argument("--calls", type=int, default=200, help="of one client (default 200)")
    parser.add_argument("--tokens", type=int, default=512, help="of its datum (default 512)")
    parser.add_argument("--clients", type=int, default=64, help="at once; 0: none (default 64)")
    parser.add_argument("--seconds", type=float, default=60, help="that they train (default 60)")
    parser.add_argument("--processes", type=int, default=4, help="of the clients (default 4)")
    parser.add_argument("--ranks", type=int, default=1, help="data parallel (default 1)")
    parser.add_argument("--platform", choices=("auto", "cpu", "cuda", "npu"), default="auto")
    parser.add_argument("--fork-ranks", action="store_true", help="quick start; CPU only")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them (.png, .svg)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the checkpoint there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write the files; return 0, or 1 if a client had an error.

    Raises ConfigError.
    """
    from megatrain.cli.bench.service import report
    from megatrain.cli.bench.service.served import Served

    _check(args)
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        scratch = tempfile.TemporaryDirectory(prefix="megatrain-bench-")
        folder, say = Path(stack.enter_context(scratch)), Progress()
        job = _job(args, folder)
        say(f"{job.shape_name}: making or finding the checkpoint in {job.checkpoint}")
        make_checkpoint(job, job.write())
        say("starting the service")
        served = stack.enter_context(Served(job.checkpoint, folder, _options(args, job.dtype)))
        overhead = _overhead(args, served, say) if args.calls else None
        crowd = _crowd(args, served, folder, say) if args.clients else None
    if args.out is not None:
        fields = {name: str(value) for name, value in vars(args).items() if name != "run"}
        found = report.to_json(overhead, crowd, fields | {"load_before": load})
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    if args.picture is not None:
        report.draw(overhead, crowd, args.picture)
    report.show(overhead, crowd, load)
    for error in [] if crowd is None else crowd.errors:
        say(error)
    return int(crowd is not None and bool(crowd.errors))


def _check(args: argparse.Namespace) -> None:
    for file in (args.out, args.picture):
        check_file(file)
    if args.calls < 0 or args.clients < 0 or not (args.calls or args.clients):
        raise ConfigError("--calls and --clients must not be negative, nor both 0")
    longest = SHAPES[args.shape].fields["max_position_embeddings"]
    if not 1 <= args.tokens <= longest:
        raise ConfigError(f"--tokens must be between 1 and {longest} for {args.shape}")
    if min(args.processes, args.ranks) < 1 or args.seconds <= 0:
        raise ConfigError("--processes and --ranks must be at least 1, --seconds more than 0")


def _job(args: argparse.Namespace, folder: Path) -> Any:
    """Return what the checkpoint is made from."""
    from megatrain.cli.bench.job import Job
    from megatrain.parallel.layout import DeviceMesh

    return Job.asked(args, folder, DeviceMesh(dp=args.ranks), threads=1)


def _options(args: argparse.Namespace, dtype: str) -> list[str]:
    from megatrain.cli.bench.job import DTYPES

    found = ["--ranks", str(args.ranks), "--platform", args.platform]
    found += ["--mixed-precision", DTYPES[dtype]]
    return [*found, "--fork-ranks"] if args.fork_ranks else found


def _overhead(args: argparse.Namespace, served: Any, say: Progress) -> Any:
    import httpx

    from megatrain.cli.bench.service.data import new_service_client
    from megatrain.cli.bench.service.overhead import measure
    from megatrain.cli.bench.service.served import NAME

    say(f"one client, {args.calls} calls with {args.tokens} tokens")
    client = new_service_client(served.url, served.key)
    training = client.create_lora_training_client(base_model=NAME, rank=16).result()
    with httpx.Client(base_url=served.url) as http:
        return measure(
            training,
            http,
            calls=args.calls,
            tokens=args.tokens,
            vocabulary=SHAPES[args.shape].fields["vocab_size"],
        )


def _crowd(args: argparse.Namespace, served: Any, folder: Path, say: Progress) -> Any:
    from megatrain.cli.bench.service.crowd import Target
    from megatrain.cli.bench.service.crowd import run as run_crowd
    from megatrain.cli.bench.service.served import NAME

    say(f"{args.clients} clients in {args.processes} processes, {args.seconds:g} s")
    vocabulary = SHAPES[args.shape].fields["vocab_size"]
    return run_crowd(
        Target(served.url, served.key, NAME, vocabulary),
        folder,
        clients=args.clients,
        processes=args.processes,
        seconds=args.seconds,
    )
