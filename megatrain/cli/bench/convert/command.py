"""`megatrain bench convert`: a random checkpoint to Megatron and back, beside `cp -r` and Bridge.

Copy and conversions run one after the other on the same files; the run ends with an error if the
checkpoint does not come back byte for byte.
"""

import argparse
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatrain.cli.bench.make import make_checkpoint
from megatrain.cli.bench.progress import Progress, check_file
from megatrain.errors import ConfigError

TIMES = 5
"""The checkpoint's bytes on the disk at a time: itself, and both systems' results."""


def add_parser(kinds: Any) -> None:
    """Declare the command and its options."""
    parser = kinds.add_parser(
        "convert",
        help="Hugging Face to Megatron and back, beside cp and Megatron-Bridge",
        description=__doc__,
    )
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="of the checkpoint, in bf16 (default 4)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes of ours (default 1)")
    parser.add_argument("--repeats", type=int, default=1, help="medians of so many (default 1)")
    parser.add_argument("--skip-peer", action="store_true", help="measure ours and cp alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write everything there")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep the checkpoint there for the next run"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the file; return 0."""
    check_file(args.out)
    with ExitStack() as stack:
        # Beside the checkpoint, whose disk is measured: the usual place may be in memory.
        near = None if args.cache is None else _made(args.cache)
        scratch = tempfile.TemporaryDirectory(prefix="megatrain-bench-", dir=near)
        folder = Path(stack.enter_context(scratch))
        job, say = make_job(args, folder), Progress()
        from megatrain.cli.bench.convert import race, table
        from megatrain.cli.bench.report import show_lines

        job_file = job.write()
        say(f"making or finding {args.gigabytes:g} GB in {job.checkpoint}")
        make_checkpoint(job, job_file, module="megatrain.cli.bench.convert.make")
        outcome = race.run(job, _systems(job, job_file, with_peer=not args.skip_peer), say)
        if args.out is not None:
            args.out.write_text(json.dumps(table.to_json(job, outcome), indent=2) + "\n")
            say(f"everything is in {args.out}")
        show_lines(table.HEADS, table.lines(job, outcome), table.notes(job, outcome))
    return 0


def make_job(args: argparse.Namespace, folder: Path) -> Any:
    """Return the checked job.  Raises ConfigError."""
    from megatrain.cli.bench.convert.job import ConvertJob

    cache = folder if args.cache is None else args.cache.resolve()
    job = ConvertJob(
        folder=folder,
        checkpoint=cache / f"convert-{args.gigabytes:g}gb-seed{args.seed}",
        gigabytes=args.gigabytes,
        workers=args.workers,
        repeats=args.repeats,
        seed=args.seed,
        load_before=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    )
    needed, free = TIMES * args.gigabytes * 1e9, shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"the checkpoint and what is made of it need {needed / 1e9:.1f} GB of disk: {folder} "
            f"has {free / 1e9:.1f} GB free",
            hint="fewer --gigabytes, or another disk with --cache DIR",
        )
    return job


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def _systems(job: Any, job_file: Path, *, with_peer: bool) -> dict[str, Any]:
    from megatrain.cli.bench.turns import System
    from megatrain.cli.quickstart.child import python_module

    names = ("ours", "peer") if with_peer else ("ours",)
    module, threads = "megatrain.cli.bench.convert.system", os.cpu_count() or 1
    return {
        name: System(
            name,
            python_module(module, str(job_file), name),
            folder=job.folder,
            num_ranks=1,
            threads=threads,
        )
        for name in names
    }
