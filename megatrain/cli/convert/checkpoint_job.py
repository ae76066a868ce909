"""What `import` and `export` of whole checkpoints have in common."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.cli.convert.job import Plan, run_job
from megatrain.errors import ConfigError


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Declare --workers."""
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")


def check_workers(args: argparse.Namespace) -> None:
    """Raise ConfigError unless --workers makes sense."""
    if args.workers < 1:
        raise ConfigError(f"--workers must be at least 1: {args.workers}")


def run_conversion(args: argparse.Namespace, job: Any, plan: Plan, target: Path) -> int:
    """Show the plan, or convert to `target`; return 0."""
    from megatrain.export.conversion.run import check, convert

    def work(progress: Any) -> Mapping[str, Any]:
        return convert(
            job,
            target,
            needed_bytes=plan.written_bytes,
            workers=args.workers,
            restart=args.restart,
            verify=args.verify,
            progress=progress,
        )

    return run_job(args, plan, work, check=lambda: check(job, target))
