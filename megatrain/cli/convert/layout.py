"""Options of a layout, as the sub-commands that have one declare them."""

import argparse

from megatrain.parallel.layout import DeviceMesh

AXES = {"tp": "tensor", "pp": "pipeline", "ep": "expert", "etp": "expert tensor"}
SIZES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Names of dtypes to cast to, and torch's."""


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Declare --tp, --pp, --ep and --etp."""
    for axis, what in AXES.items():
        parser.add_argument(
            f"--{axis}", type=int, default=1, metavar="N", help=f"{what} parallel ranks (default 1)"
        )


def mesh_of(args: argparse.Namespace) -> DeviceMesh:
    """Return the smallest mesh of these sizes.  Raises LayoutError for one that cannot be."""
    dp = 1
    while args.tp >= 1 and (dp * args.tp) % max(1, args.ep * args.etp) and dp < args.ep * args.etp:
        dp += 1
    return DeviceMesh(dp=dp, tp=args.tp, pp=args.pp, ep=args.ep, etp=args.etp)
