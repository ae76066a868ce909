"""The command `megatrain train`: its options, and who runs the job.

Under torchrun (RANK is set) this process is a rank.  Otherwise it runs the job itself, or starts
as many ranks as the mesh needs.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.errors import ConfigError

if TYPE_CHECKING:
    from megatrain.config.run import RunConfig

HELP = "train from a TOML file: pt, sft, dpo, kto, rm or distillation; LoRA or all parameters"


def add_parser(subparsers: Any) -> None:
    """Declare the command; `args.run` is the function that runs it."""
    parser = subparsers.add_parser("train", help=HELP, description=HELP)
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one key, as train.batch_size=16 or data.train.0.dataset_id=rows.jsonl;"
        " the value is TOML, or else a string; may be repeated",
    )
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="ranks to start on this machine, not under torchrun (default: the mesh's)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print layout, batches and estimated memory, and train nothing",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0, or 128 + signal if it was stopped and has saved."""
    from megatrain.config.run import read

    config = read(args.config, args.overrides)
    under_torchrun = "RANK" in os.environ
    if under_torchrun and args.nproc is not None:
        raise ConfigError("--nproc starts ranks, and torchrun has started them: leave it out")
    _check(config)
    if args.dry_run:
        from megatrain.cli.train.dry_run import dry_run

        dry_run(config, num_ranks=args.nproc or config.num_ranks)
        return 0
    return _run_rank(config) if under_torchrun else _run_here(config, args.nproc)


def _check(config: "RunConfig") -> None:
    """Refuse what cannot work before ranks are started and weights are read."""
    from megatrain.cli.train.hub import check_hub
    from megatrain.cli.train.trackers import check_trackers

    check_trackers(config.report.trackers)
    check_hub(config.report)


def _run_rank(config: "RunConfig") -> int:
    """Run this rank of torchrun's; the first one of all prepares the folder."""
    from megatrain.cli.train.job import run_job

    if os.environ["RANK"] == "0":
        _prepare(config)
    return run_job(config)


def _run_here(config: "RunConfig", nproc: int | None) -> int:
    """Run the job in this process, or on ranks that are started for it."""
    from megatrain.cli.train.mesh import mesh_of

    num_ranks = config.num_ranks if nproc is None else nproc
    mesh_of(config, num_ranks)
    file = _prepare(config)
    if num_ranks == 1:
        from megatrain.cli.train.job import run_job

        return run_job(config)
    from megatrain.cli.train.launch import run_ranks

    return run_ranks(file, num_ranks=num_ranks, logs=file.parent / "logs")


def _prepare(config: "RunConfig") -> Path:
    """Make the output directory, write the whole configuration there; return its path."""
    from megatrain.cli.train.folder import RunFolder

    folder = RunFolder(Path(config.output_dir))
    folder.prepare(overwrite=config.train.overwrite, resume=config.train.resume != "none")
    folder.config.write_text(config.model_dump_json(indent=2, exclude_none=True) + "\n")
    return folder.config.resolve()
