"""`megatrain data stats`: how many rows and tokens a data set has, and how long its rows are.

Rows are mapped and encoded as for training, but for the limit on their length: rows that are longer
are counted, so that a limit can be chosen.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    data = subparsers.add_parser("data", help="what is in a data set", description=__doc__)
    kinds = data.add_subparsers(required=True, metavar="stats")
    parser = kinds.add_parser(
        "stats", help="rows, tokens, lengths, and how full packed rows are", description=__doc__
    )
    parser.add_argument("path", metavar="PATH", help="a file, a folder, hf://id or ms://id")
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="whose tokenizer and chat template: a folder or id",
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens a row may have")
    parser.add_argument("--preprocessor", metavar="NAME", help="a name, or package.module:Name")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the preprocessor; may be repeated",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run a preprocessor's code from a file or a hub",
    )
    parser.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="leave out rows that cannot be used, instead of ending with the first one",
    )
    parser.add_argument("--subset", metavar="NAME", help="a hub's subset, or a folder in PATH")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--packing", action="store_true", help="pack rows to --max-length")
    parser.add_argument("--num-proc", type=int, metavar="N", help="processes that map and encode")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write lengths.png and stats.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Encode, print the table, write the files; return 0."""
    if args.max_length is not None and args.max_length < 1:
        raise ConfigError(f"--max-length must be at least 1 token: got {args.max_length}")
    if args.packing and args.max_length is None:
        raise ConfigError("--packing needs a length to pack to", hint="add --max-length 4096")
    if args.option and args.preprocessor is None:
        raise ConfigError("--option has no effect without --preprocessor")
    if args.trust_remote_code and args.preprocessor is None:
        raise ConfigError("--trust-remote-code has no effect without --preprocessor")
    # Imports stay off the path of `--help`.
    from megatrain.cli.data.report import plot, show, table_rows

    dataset = _encode(args)
    if args.packing and dataset.has_pairs:
        raise ConfigError(
            "--packing: rows with a chosen and a rejected answer cannot be packed",
            hint="leave --packing out",
        )
    statistics = dataset.statistics()
    packed, num_too_long = _pack(dataset, args) if args.max_length else (None, 0)
    rows = table_rows(statistics, packed if args.packing else None, args.max_length, num_too_long)
    show(rows, title=args.path)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(dataset.lengths, args.out / "lengths.png", max_length=args.max_length)
        (args.out / "stats.json").write_text(json.dumps(dict(rows), indent=2) + "\n")
        print(f"lengths.png and stats.json are in {args.out}")
    return 0


def _encode(args: argparse.Namespace) -> Any:
    from megatrain.data.dataset import Dataset
    from megatrain.data.meta import DatasetMeta

    meta = DatasetMeta(args.path, args.subset, args.split)
    dataset = Dataset(meta, on_error="skip" if args.skip_bad_rows else "raise")
    dataset.set_template("Template", model_id=args.model)
    if args.preprocessor is not None:
        options = dict(_key_and_value(text) for text in args.option)
        dataset.map(
            args.preprocessor,
            num_proc=args.num_proc,
            trust_remote_code=args.trust_remote_code,
            **options,
        )
    return dataset.encode(num_proc=args.num_proc)


def _pack(dataset: Any, args: argparse.Namespace) -> tuple[Any, int]:
    """Return the statistics of the packed rows (None if nothing fits), and what does not fit."""
    import numpy as np

    from megatrain.data.packing import best_fit_decreasing
    from megatrain.data.statistics import DatasetStatistics

    fits = dataset.lengths <= args.max_length
    lengths, labels = dataset.lengths[fits], dataset.num_labels[fits]
    num_too_long = int((~fits).sum())
    if not len(lengths):
        return None, num_too_long
    groups = best_fit_decreasing(lengths, args.max_length)
    packed = DatasetStatistics.of(
        np.array([lengths[group].sum() for group in groups]),
        np.array([labels[group].sum() for group in groups]),
        max_length=args.max_length,
        num_samples=len(lengths),
    )
    return packed, num_too_long


def _key_and_value(text: str) -> tuple[str, Any]:
    """Return a key and its value: JSON where it is some, else the text itself."""
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise ConfigError(f"--option must be KEY=VALUE: got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
