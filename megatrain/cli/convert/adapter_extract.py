"""`megatrain convert adapter extract`: the adapter that makes one checkpoint of another.

The difference of each matrix is cut to rank R by singular values; what is lost is reported as a
Frobenius norm, relative to the difference's.  Tensors that differ and are no matrices are refused.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.cli.convert.adapter_job import (
    add_places,
    check_target,
    dtype_of,
    error_report,
    write,
)
from megatrain.cli.convert.job import Plan, Progress, add_options, run_job


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "extract", help="difference of two checkpoints to an adapter", description=__doc__
    )
    add_places(
        parser,
        base="a checkpoint: folder, hub id or URL",
        tuned="the other one, of the same model",
        out="a new folder, or a URL",
    )
    parser.add_argument("--rank", type=int, required=True, metavar="R")
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN", help="tensors that may differ: *norm*"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the factors (default float32)"
    )
    add_options(parser, verify="read it back and measure what is left, by itself", restart=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; return 0."""
    from megatrain.checkpoint.remote import local_source, local_target
    from megatrain.export.adapters.extract import plan_extract

    with (
        local_source(args.base) as base,
        local_source(args.tuned) as tuned,
        local_target(args.out) as target,
    ):
        check_target(target, base, tuned)
        job = plan_extract(base, tuned, rank=args.rank, ignored=args.ignore)
        plan = Plan(
            what="adapter extract",
            source=f"{args.tuned} - {args.base}",
            target=args.out,
            read_bytes=job.num_bytes,
            written_bytes=job.largest_adapter(dtype_of(args.dtype).itemsize),
            memory_bytes=job.largest_adapter(4) + 6 * job.largest_matrix,
            num_tensors=len(job.base),
            details={"rank": args.rank},
        )
        return run_job(args, plan, lambda progress: _extract(args, job, target, progress))


def _extract(
    args: argparse.Namespace, job: Any, target: Path, progress: Progress
) -> Mapping[str, Any]:
    from megatrain.export.adapters.extract import extract, verify_extract

    found = extract(job, progress, base_model=args.base, dtype=dtype_of(args.dtype))
    result = error_report(found.errors, found.relative_error)
    result["ignored"] = found.ignored

    def check(folder: Path) -> None:
        left = verify_extract(job, folder)
        result["verified"] = f"read back; {left:.3g} of the difference is left"

    write(target, found.files, check if args.verify else None)
    return result
