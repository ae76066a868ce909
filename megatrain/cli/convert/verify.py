"""`megatrain convert verify`: whether two checkpoints or adapters are the same, and where not.

Without --text and --layers, files are compared: names, shapes, dtypes and bytes.  With --text, the
log-probabilities that A and B give a text; with --layers, activations and gradients module by
module.  The exit status is 1 if they differ.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatrain.cli.convert.verify_place import local_place
from megatrain.errors import ConfigError

AXES = ("tp", "pp", "cp", "ep", "etp")
SYSTEMS = ("transformers", "megatrain")
DTYPES = ("float32", "bfloat16")


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "verify", help="whether two places hold, or compute, the same", description=__doc__
    )
    parser.add_argument("a", metavar="A", help="a checkpoint, adapter or training state")
    parser.add_argument("b", metavar="B", help="the other one; A again compares two layouts")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="of files: relative to a tensor's largest entry (default: bytes must be the same); "
        "of log-probabilities: absolute (default 1e-5; in bfloat16 5e-2); of layers: relative to "
        "the largest entry (default 1e-4; in bfloat16 5e-2)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write all of it as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    computed = parser.add_argument_group("what is computed")
    computed.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="plain text, or messages in *.jsonl, for A's tokenizer",
    )
    computed.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="of PEFT, on top of B; on top of both if A and B are one checkpoint",
    )
    computed.add_argument(
        "--layers",
        action="store_true",
        help="compare module by module (random tokens without --text)",
    )
    computed.add_argument(
        "--with", dest="system", choices=SYSTEMS, default=SYSTEMS[0], help="what computes B"
    )
    computed.add_argument(
        "--reference", choices=SYSTEMS, default=SYSTEMS[0], help="what computes A, on one rank"
    )
    computed.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the computation")
    for axis in AXES:
        computed.add_argument(f"--{axis}", type=int, default=1, metavar="N", help="with megatrain")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, tell, and return 1 if something differs, else 0."""
    _check(args)
    with local_place(args.a) as a, local_place(args.b) as b:
        report = _compare(args, a, b)
    content = {"a": args.a, "b": args.b, **report.to_dict()}
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(content, indent=1) + "\n")
    if args.json:
        print(json.dumps(content, indent=1))
    else:
        from megatrain.cli.convert.verify_lines import lines

        print("\n".join(lines(report)))
    return 0 if report.same else 1


def _compare(args: argparse.Namespace, a: Path, b: Path) -> Any:
    from megatrain.export.compare.place import recognise

    if args.layers or args.text is not None:
        from megatrain.cli.convert.verify_computed import compare_computed

        return compare_computed(args, a, b)
    from megatrain.cli.convert.job import Progress
    from megatrain.export.compare.files import compare_files
    from megatrain.export.compare.source import align, open_source

    one, other = align(open_source(recognise(a)), open_source(recognise(b)))
    total = sum(tensor.num_bytes for name, tensor in one.tensors.items() if name in other.tensors)
    with Progress("verify", total) as progress:
        return compare_files(one, other, tolerance=args.tolerance, progress=progress)


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that have no effect or no meaning."""
    computes = args.layers or args.text is not None
    sizes = {axis: getattr(args, axis) for axis in AXES}
    split = [f"--{axis}" for axis, size in sizes.items() if size != 1]
    if not computes:
        idle = split + [
            option
            for option, value, default in (
                ("--adapter", args.adapter, None),
                ("--with", args.system, SYSTEMS[0]),
                ("--reference", args.reference, SYSTEMS[0]),
                ("--dtype", args.dtype, DTYPES[0]),
            )
            if value != default
        ]
        if idle:
            raise ConfigError(
                f"{', '.join(idle)} have no effect on files",
                hint="add --text FILE or --layers to compare what is computed",
            )
    if split and args.system != "megatrain":
        raise ConfigError(f"{', '.join(split)} have no effect without --with megatrain")
    if args.tolerance is not None and not args.tolerance >= 0:
        raise ConfigError(f"--tolerance must be 0 or more: {args.tolerance}")
