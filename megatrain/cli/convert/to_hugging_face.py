"""`megatrain convert export`: a Megatron distributed checkpoint as a Hugging Face checkpoint.

From any layout.  One that `convert import` made gives back the files that it was made of; for any
other, --config names a folder with the model's config.json and tokenizer.
"""

import argparse
from pathlib import Path
from typing import Any

from megatrain.cli.convert.checkpoint_job import add_workers, check_workers, run_conversion
from megatrain.cli.convert.job import Plan, add_options
from megatrain.cli.convert.layout import SIZES
from megatrain.cli.plan.command import parse_bytes
from megatrain.errors import CheckpointError

SHARD = "5GB"
"""Size of a file where the source does not say."""


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "export", help="Megatron (torch_dist) to Hugging Face", description=__doc__
    )
    parser.add_argument("source", metavar="MEGATRON_DIR", help="a folder or a URL")
    parser.add_argument("target", metavar="OUT", help="a new folder, or a URL")
    parser.add_argument(
        "--config", metavar="HF_DIR", help="configuration and tokenizer; default: what is carried"
    )
    parser.add_argument("--dtype", choices=SIZES, help="cast; default: as each tensor was stored")
    parser.add_argument("--shard-size", help="of a file (default: as it was, or 5GB)")
    add_workers(parser)
    add_options(parser, verify="load the result and compare every parameter's bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; return 0."""
    from megatrain.checkpoint.remote import local_source, local_target

    check_workers(args)
    with (
        local_source(args.source, is_checkpoint=False) as source,
        local_target(args.target) as target,
    ):
        if not source.is_dir():
            raise CheckpointError(f"no folder at {args.source}")
        return _run(args, source, target)


def _run(args: argparse.Namespace, source: Path, target: Path) -> int:
    from megatrain.platforms.choose import choose_platform, prepare

    prepare(choose_platform("cpu"))  # before anything imports Megatron
    job = _job(args, source)
    from megatrain.export.conversion.memory import needed_memory

    specs = {name: each.spec for name, each in job.originals.items()}
    total = sum(spec.num_bytes for spec in specs.values())
    plan = Plan(
        what="export",
        source=args.source,
        target=args.target,
        read_bytes=total,
        written_bytes=total,
        memory_bytes=needed_memory(specs),
        num_tensors=len(job.originals),
        details={"dtype": args.dtype or "as stored"},
    )
    return run_conversion(args, job, plan, target)


def _job(args: argparse.Namespace, source: Path) -> Any:
    import torch

    from megatrain.checkpoint.locate import TOKENIZER_FILES, locate
    from megatrain.export.conversion.carried import FOLDER, read_originals
    from megatrain.export.conversion.expected import expected_originals
    from megatrain.export.conversion.to_hugging_face import ToHuggingFace

    config = source / FOLDER
    if args.config is not None:
        config = locate(args.config, TOKENIZER_FILES)
    elif not config.is_dir():
        raise CheckpointError(
            f"{args.source} carries no configuration",
            hint="name a folder or hub id of the same model: --config HF_DIR",
        )
    carried = read_originals(config)
    shard = args.shard_size or (SHARD if carried is None else None)
    return ToHuggingFace(
        source,
        config,
        expected_originals(config) if carried is None else carried,
        keeps_dtypes=carried is not None,
        cast=None if args.dtype is None else getattr(torch, SIZES[args.dtype]),
        shard_bytes=None if shard is None else parse_bytes(shard),
    )
