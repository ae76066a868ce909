"""`megatrain convert`: Hugging Face, Megatron and PEFT files into one another, streamed."""

from typing import Any

from megatrain.cli.convert import (
    adapter_average,
    adapter_export,
    adapter_extract,
    adapter_import,
    adapter_merge,
    adapter_resize,
    inspect,
    to_hugging_face,
    to_megatron,
    verify,
)

SUBCOMMANDS = (to_megatron, to_hugging_face, inspect, verify)
"""Modules with add_parser(subparsers); each sets `run`, which returns the exit status."""
ADAPTER_SUBCOMMANDS: tuple[Any, ...] = (
    adapter_import,
    adapter_export,
    adapter_merge,
    adapter_extract,
    adapter_resize,
    adapter_average,
)
"""The same, of `megatrain convert adapter`."""


def add_parser(subparsers: Any) -> None:
    """Declare the command and its sub-commands."""
    parser = subparsers.add_parser(
        "convert", help="checkpoints and adapters, from one format to another", description=__doc__
    )
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    for command in SUBCOMMANDS:
        command.add_parser(kinds)
    adapter = kinds.add_parser("adapter", help="LoRA adapters", description="LoRA adapters.")
    adapters = adapter.add_subparsers(required=True, metavar="WHAT")
    for command in ADAPTER_SUBCOMMANDS:
        command.add_parser(adapters)
