"""`megatrain convert import`: a Hugging Face checkpoint as a Megatron distributed checkpoint.

The result is in Megatron's torch_dist format, which can be loaded on any layout; with a layout
given it is cut as that layout reads it.  Configuration and tokenizer go along.
"""

import argparse
from pathlib import Path
from typing import Any

from megatrain.cli.convert.checkpoint_job import add_workers, check_workers, run_conversion
from megatrain.cli.convert.job import Plan, add_options
from megatrain.cli.convert.layout import SIZES, add_layout, mesh_of
from megatrain.cli.plan.command import parse_bytes


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "import", help="Hugging Face to Megatron (torch_dist)", description=__doc__
    )
    parser.add_argument("source", metavar="HF_DIR", help="a folder, a hub's id or a URL")
    parser.add_argument("target", metavar="OUT", help="a new folder, or a URL")
    add_layout(parser)
    parser.add_argument("--dtype", choices=SIZES, help="cast; default: as each tensor is stored")
    parser.add_argument("--file-size", default="2GB", help="of a .distcp file (default 2GB)")
    add_workers(parser)
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pytorch_model*.bin, tensors only"
    )
    add_options(parser, verify="undo the conversion and compare every tensor's bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; return 0."""
    from megatrain.checkpoint.remote import local_source, local_target

    check_workers(args)
    with (
        local_source(args.source, allow_pickle=args.allow_pickle) as source,
        local_target(args.target) as target,
    ):
        return _run(args, source, target)


def _run(args: argparse.Namespace, source: Path, target: Path) -> int:
    import torch

    from megatrain.platforms.choose import choose_platform, prepare

    prepare(choose_platform("cpu"))  # before anything imports Megatron
    from megatrain.export.conversion.carried import originals_of
    from megatrain.export.conversion.memory import needed_memory
    from megatrain.export.conversion.to_megatron import ToMegatron

    cast = None if args.dtype is None else getattr(torch, SIZES[args.dtype])
    job = ToMegatron(source, mesh_of(args), cast, parse_bytes(args.file_size), args.allow_pickle)
    checkpoint = job.open()
    specs = {name: each.spec for name, each in originals_of(checkpoint).items()}
    read = sum(spec.num_bytes for spec in specs.values())
    plan = Plan(
        what="import",
        source=args.source,
        target=args.target,
        read_bytes=read,
        written_bytes=sum(_written(spec, cast) for spec in specs.values()),
        memory_bytes=needed_memory(specs, is_quantized=checkpoint.is_quantized),
        num_tensors=len(specs),
        details={"layout": job.mesh.describe(), "dtype": args.dtype or "as stored"},
    )
    return run_conversion(args, job, plan, target)


def _written(spec: Any, cast: Any) -> int:
    kept = cast is None or not spec.dtype.is_floating_point
    size: int = spec.num_bytes
    return size if kept else size * cast.itemsize // spec.dtype.itemsize
