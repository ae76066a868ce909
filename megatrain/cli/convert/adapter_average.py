"""`megatrain convert adapter average`: the weighted sum of adapters of one model.

Exact, at the sum of their ranks; --rank cuts it down afterwards, with the error reported.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatrain.cli.convert.adapter_job import check_target, error_report, small_plan, write
from megatrain.cli.convert.job import Progress, add_options, run_job


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser("average", help="several adapters to one", description=__doc__)
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="PEFT directories with the same targets"
    )
    parser.add_argument("out", metavar="OUT", help="a new folder, or a URL")
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one each (default: all the same)"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="cut the sum down to this rank")
    add_options(parser, verify="read it back and measure its distance to the sum", restart=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; return 0."""
    from megatrain.checkpoint.remote import local_source, local_target
    from megatrain.export.adapters.average import check_averageable
    from megatrain.export.adapters.low_rank import check_rank
    from megatrain.export.adapters.peft_file import read_peft

    weights = args.weights or [1 / len(args.adapters)] * len(args.adapters)
    if args.rank is not None:
        check_rank(args.rank)
    with ExitStack() as stack:
        folders = [
            stack.enter_context(local_source(each, is_checkpoint=False)) for each in args.adapters
        ]
        target = stack.enter_context(local_target(args.out))
        check_target(target, *folders)
        files = [read_peft(each) for each in folders]
        check_averageable(files, weights)
        plan = small_plan(
            "average",
            " + ".join(f"{w:g} * {each}" for w, each in zip(weights, args.adapters, strict=True)),
            args.out,
            sum(each.num_bytes for each in files),
            len(files[0].tensors),
            rank=args.rank or sum(each.layers[0].rank for each in files),
        )
        return run_job(
            args, plan, lambda progress: _average(args, files, weights, target, progress)
        )


def _average(
    args: argparse.Namespace,
    files: Sequence[Any],
    weights: Sequence[float],
    target: Path,
    progress: Progress,
) -> Mapping[str, Any]:
    from megatrain.export.adapters.average import average
    from megatrain.export.adapters.peft_file import as_file, read_peft
    from megatrain.export.adapters.resize import distance, resize

    exact = as_file(average(files, weights, progress))
    written, result = exact.files, {}
    if args.rank is not None:
        small = resize(exact, args.rank, lambda _: None)
        written, result = small.files, error_report(small.errors, small.relative_error)

    def check(folder: Path) -> None:
        left = distance(exact, read_peft(folder))
        result["verified"] = f"read back; {left:.3g} of the sum is lost"

    write(target, written, check if args.verify else None)
    return result
