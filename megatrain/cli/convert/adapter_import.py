"""`megatrain convert adapter import`: a PEFT directory as a state that training starts from.

No base model is built or read: names and shapes come from PEFT's two files.  `export` of the state
gives the same tensors and the same configuration back.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.cli.convert.adapter_job import add_places, check_target, small_plan
from megatrain.cli.convert.job import Progress, add_options, run_job


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "import", help="PEFT directory to training state", description=__doc__
    )
    add_places(parser, peft_dir="a folder, hub id or URL", out="a new folder, or a URL")
    parser.add_argument(
        "--model-type",
        help="of the base's config.json (qwen3_moe); for stacked experts whose family the "
        "adapter's config does not tell",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of dropout, where training goes on (default 0)"
    )
    add_options(
        parser, verify="export the state again, in memory, and compare every byte", restart=False
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; return 0."""
    from megatrain.checkpoint.remote import local_source, local_target
    from megatrain.export.adapters.canonical import canonical
    from megatrain.export.adapters.peft_file import base_model_type, read_peft

    with (
        local_source(args.peft_dir, is_checkpoint=False) as source,
        local_target(args.out) as target,
    ):
        check_target(target, source, writes_state=True)
        file = read_peft(source)
        parts = canonical(file, base_model_type(file.config, args.model_type))
        plan = small_plan(
            "import",
            args.peft_dir,
            args.out,
            file.num_bytes,
            len(file.tensors),
            2 * file.num_bytes,
            linears=len(parts.tensors) // 2,
            ranks=", ".join(map(str, sorted({each.rank for each in file.layers}))),
            stacked=len(parts.stacked),
        )
        return run_job(args, plan, lambda progress: _import(args, source, target, progress))


def _import(
    args: argparse.Namespace, source: Path, target: Path, progress: Progress
) -> Mapping[str, Any]:
    from megatrain.export.adapters.from_state import check_same_as, read_saved
    from megatrain.export.adapters.import_adapter import import_adapter
    from megatrain.export.adapters.peft_file import read_peft
    from megatrain.export.resumable import check_space, explained

    size = read_peft(source).num_bytes
    check_space(target, 2 * size)
    result: dict[str, Any] = {}

    def check(folder: Path) -> None:
        result["verified"] = check_same_as(read_saved(folder), source)

    with explained(target):
        record = import_adapter(
            source,
            target,
            model_type=args.model_type,
            seed=args.seed,
            check=check if args.verify else None,
        )
    progress(size)
    return {"base_model": record.base_model, "lora": record.lora, **result}
