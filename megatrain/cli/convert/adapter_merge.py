"""`megatrain convert adapter merge`: a base checkpoint with an adapter added, shard by shard.

Arithmetic is float32, the dtype stays each tensor's own.  A run that was interrupted goes on where
it stopped.  A tied head is written apart if it, or the embedding, is adapted.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.cli.convert.adapter_job import add_places, check_target
from megatrain.cli.convert.job import Plan, Progress, add_options, run_job


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "merge", help="base and adapter to a checkpoint", description=__doc__
    )
    add_places(
        parser,
        base="a checkpoint: folder, hub id or URL",
        adapter="a PEFT directory: folder, hub id or URL",
        out="a new folder, or a URL",
    )
    add_options(parser, verify="read it back, compute it again and compare every byte")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; return 0."""
    from megatrain.checkpoint.remote import local_source, local_target
    from megatrain.export.adapters.merge import check_is_new, plan_merge

    with (
        local_source(args.base) as base,
        local_source(args.adapter, is_checkpoint=False) as adapter,
        local_target(args.out) as target,
    ):
        check_target(target, base, adapter)
        check_is_new(target)
        job = plan_merge(base, adapter)
        plan = Plan(
            what="adapter merge",
            source=f"{args.base} + {args.adapter}",
            target=args.out,
            read_bytes=(2 if args.verify else 1) * job.num_bytes,
            written_bytes=job.num_bytes,
            memory_bytes=job.memory_bytes,
            num_tensors=sum(map(len, job.shards.values())),
            details={
                "changed": f"{len(job.deltas.of)} tensors",
                "files": len(job.shards),
                "head": "untied" if job.untied else "as in the base",
            },
        )
        return run_job(args, plan, lambda progress: _merge(args, job, target, progress))


def _merge(
    args: argparse.Namespace, job: Any, target: Path, progress: Progress
) -> Mapping[str, Any]:
    from megatrain.export.adapters.merge import merge

    return merge(job, target, progress, restart=args.restart, verify=args.verify)
