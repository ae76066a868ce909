"""`megatrain bench train`: tokens per second here and on Transformers + PEFT, in one run.

Both train the same LoRA adapter on the same random checkpoint and batch, in the same precision and
with as many threads, each in a process of its own; they take turns, and the run ends with an error
if they do not compute the same log-probabilities and loss.
"""

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatrain.cli.bench import tenants
from megatrain.cli.bench.convert import command as convert
from megatrain.cli.bench.make import make_checkpoint
from megatrain.cli.bench.progress import Progress, check_file
from megatrain.cli.bench.service import command as service
from megatrain.cli.bench.shapes import SHAPES

AXES = ("tp", "pp", "cp", "ep", "dp")


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    bench = subparsers.add_parser(
        "bench",
        help="how fast this is, beside Transformers + PEFT and Megatron-Bridge",
        description="The same work here and elsewhere, on one machine in one run.",
    )
    kinds = bench.add_subparsers(required=True, metavar="WHAT")
    convert.add_parser(kinds)
    tenants.add_parser(kinds)
    service.add_parser(kinds)
    parser = kinds.add_parser(
        "train", help="forward, backward and optimizer step of LoRA", description=__doc__
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument(
        "--dtype", choices=("float32", "bf16"), help="default: float32 for tiny and 100m, else bf16"
    )
    parser.add_argument(
        "--threads", type=int, help="of each system, over all its ranks (default: all cores)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="medians of so many (default 5)")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA (default 16)")
    parser.add_argument(
        "--max-tokens", type=int, help="of a micro-batch, padding included (default: the shape's)"
    )
    parser.add_argument("--backend", choices=("auto", "torch", "te"), default="auto")
    parser.add_argument(
        "--recompute", action="store_true", help="recompute activations, in ours only"
    )
    for axis in AXES:
        parser.add_argument(
            f"--{axis}", type=int, default=1, help=f"{axis.upper()} of ours (default 1)"
        )
    parser.add_argument("--skip-peer", action="store_true", help="measure ours alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write everything there")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep the checkpoint there for the next run"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the file; return 0."""
    from megatrain.cli.bench import report  # imports stay off the path of `--help`
    from megatrain.cli.bench.race import Race
    from megatrain.config.estimate.work import Work

    check_file(args.out)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megatrain-bench-")))
        job, say = make_job(args, folder), Progress()
        job_file = job.write()
        say(f"{job.shape_name}: making or finding the checkpoint in {job.checkpoint}")
        make_checkpoint(job, job_file)
        found = json.loads((job.checkpoint / "bench.json").read_text())
        work = Work.of(found["tensors"], found["config"])
        outcome = Race(job, _systems(job, job_file, with_peer=not args.skip_peer), say).run()
        table = report.rows(job, outcome, work)
        if args.out is not None:
            whole = report.to_json(job, outcome, work, table)
            args.out.write_text(json.dumps(whole, indent=2) + "\n")
            say(f"everything is in {args.out}")
        report.show(table, report.notes(job, outcome, work))
    return 0


def make_job(args: argparse.Namespace, folder: Path) -> Any:
    """Return the checked job.  Raises ConfigError."""
    from megatrain.cli.bench.job import Job
    from megatrain.parallel.layout import DeviceMesh

    tokens = args.max_tokens
    return Job.asked(
        args,
        folder,
        DeviceMesh(**{axis: getattr(args, axis) for axis in AXES}),
        threads=_num_cores() if args.threads is None else args.threads,
        repeats=args.repeats,
        rank=args.rank,
        max_tokens=SHAPES[args.shape].max_tokens if tokens is None else tokens,
        backend=args.backend,
        recompute=args.recompute,
        seed=args.seed,
        load_before=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    )


def _systems(job: Any, job_file: Path, *, with_peer: bool) -> dict[str, Any]:
    from megatrain.cli.bench.turns import System
    from megatrain.cli.quickstart.child import python_module, torchrun

    world = job.mesh.world_size
    module, argument = "megatrain.cli.bench.ours", str(job_file)
    command = python_module(module, argument)
    if world > 1:
        command = torchrun(module, argument, world_size=world)
    ours = System("ours", command, folder=job.folder, num_ranks=world, threads=job.threads_per_rank)
    if not with_peer:
        return {"ours": ours}
    command = python_module("megatrain.cli.bench.peer", argument)
    peer = System("peer", command, folder=job.folder, num_ranks=1, threads=job.threads)
    return {"ours": ours, "peer": peer}


def _num_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)
