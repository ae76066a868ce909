"""`megatrain convert inspect`: what a path is, and what is in it, as a table.

Only headers are read, so the size of a checkpoint does not matter.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from megatrain.cli.convert.verify_place import local_place

if TYPE_CHECKING:
    from megatrain.export.compare.describe import Description
    from megatrain.export.compare.place import Place


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser("inspect", help="what a path is", description=__doc__)
    parser.add_argument("path", metavar="PATH", help="a file, a folder, a hub's id, or a URL")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; return 0.  Raises CheckpointError or DataError."""
    from megatrain.export.compare.place import recognise

    with local_place(args.path) as path:
        description = _describe(recognise(path))
    if args.json:
        print(json.dumps(description.to_dict(with_tensors=args.tensors), indent=1))
    else:
        _show(description, title=args.path, with_tensors=args.tensors)
    return 0


def _describe(place: "Place") -> "Description":
    from megatrain.export.compare import describe

    match place.kind:
        case "hugging face":
            return describe.describe_checkpoint(place)
        case "adapter":
            return describe.describe_adapter(place)
        case "state":
            return describe.describe_state(place)
        case "torch_dist":
            from megatrain.export.compare.describe_torch_dist import describe_torch_dist

            return describe_torch_dist(place)
        case "dataset":
            from megatrain.export.compare.describe_data import describe_data

            return describe_data(place)


def _show(description: "Description", *, title: str, with_tensors: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=title, show_header=False)
    table.add_row("what", description.what)
    for name, value in description.facts.items():
        if value is not None:
            table.add_row(name, _words(value))
    if largest := description.largest:
        table.add_row("tensors", f"{len(description.tensors):,}")
        for dtype, found in description.dtypes.items():
            table.add_row(dtype, f"{found['tensors']:,} tensors, {found['bytes']:,} bytes")
        shape = " x ".join(map(str, largest.shape))
        table.add_row("largest", f"{largest.name} ({shape}, {largest.num_bytes:,} bytes)")
    console.print(table)
    if with_tensors:
        for tensor in description.tensors:
            shape = " x ".join(map(str, tensor.shape)) or "one number"
            print(f"{tensor.name}  {tensor.dtype}  {shape}  {tensor.num_bytes:,}  {tensor.file}")


def _words(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case list() | tuple() | set():
            return ", ".join(map(str, value))
        case dict():
            return ", ".join(f"{key}: {each}" for key, each in value.items())
        case _:
            return str(value)
