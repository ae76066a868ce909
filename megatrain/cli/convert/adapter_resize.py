"""`megatrain convert adapter resize`: an adapter at another rank, the best one that there is.

The products B A are never formed.  A larger rank is exact.  Scales, layout and dtype stay.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.cli.convert.adapter_job import (
    add_places,
    check_target,
    error_report,
    small_plan,
    write,
)
from megatrain.cli.convert.job import Progress, add_options, run_job


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser("resize", help="an adapter to another rank", description=__doc__)
    add_places(parser, adapter="a PEFT directory", out="a new folder, or a URL")
    parser.add_argument("--rank", type=int, required=True, metavar="R")
    add_options(
        parser, verify="read it back and measure its distance to the adapter again", restart=False
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; return 0."""
    from megatrain.checkpoint.remote import local_source, local_target
    from megatrain.export.adapters.low_rank import check_rank
    from megatrain.export.adapters.peft_file import read_peft

    check_rank(args.rank)
    with (
        local_source(args.adapter, is_checkpoint=False) as source,
        local_target(args.out) as target,
    ):
        check_target(target, source)
        file = read_peft(source)
        ranks = sorted({each.rank for each in file.layers})
        plan = small_plan(
            "resize",
            args.adapter,
            args.out,
            file.num_bytes,
            len(file.tensors),
            file.num_bytes * args.rank // ranks[0],
            ranks=f"{', '.join(map(str, ranks))} -> {args.rank}",
        )
        return run_job(args, plan, lambda progress: _resize(args, file, target, progress))


def _resize(
    args: argparse.Namespace, file: Any, target: Path, progress: Progress
) -> Mapping[str, Any]:
    from megatrain.export.adapters.peft_file import read_peft
    from megatrain.export.adapters.resize import distance, resize

    found = resize(file, args.rank, progress)
    result = error_report(found.errors, found.relative_error)

    def check(folder: Path) -> None:
        left = distance(file, read_peft(folder))
        result["verified"] = f"read back; {left:.3g} of the adapter is lost"

    write(target, found.files, check if args.verify else None)
    return result
