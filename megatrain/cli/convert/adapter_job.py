"""What the sub-commands on adapters share: a plan for small files, and writing them."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatrain.cli.convert.job import Plan

WORST = 10
"""Modules that a report names, by their error."""


def small_plan(
    what: str,
    sources: str,
    target: str,
    num_bytes: int,
    num_tensors: int,
    written: int | None = None,
    **details: Any,
) -> Plan:
    """Return the plan of a conversion that holds all of an adapter in memory."""
    return Plan(
        what=f"adapter {what}",
        source=sources,
        target=target,
        read_bytes=num_bytes,
        written_bytes=num_bytes if written is None else written,
        memory_bytes=2 * num_bytes,
        num_tensors=num_tensors,
        details=details,
    )


def check_target(target: Path, *sources: Path, writes_state: bool = False) -> None:
    """Raise ExportError if OUT is a source, or holds a training state that would be lost."""
    from megatrain.errors import ExportError
    from megatrain.export.state.record import FOLDER, has_state

    for source in sources:
        if target.exists() and target.samefile(source):
            raise ExportError(
                f"OUT must be another folder than what is read: OUT={target}, read={source}",
                hint="choose another folder",
            )
    if not writes_state and has_state(target):
        raise ExportError(
            f"OUT must not hold a training state, which would be lost: {target / FOLDER}",
            hint="choose another folder, or remove this one",
        )


def write(target: Path, files: Any, check: Callable[[Path], None] | None = None) -> None:
    """Write an adapter's files in one step, if the disk has room for them.

    `check` is given the folder before it is at its place, where it never comes if that raises.
    """
    from megatrain.export.peft_adapter import is_adapter_without_state, write_files
    from megatrain.export.resumable import check_space, explained

    check_space(target, sum(each.nbytes for each in files.weights.values()))
    with explained(target):
        write_files(target, files, check, may_replace=is_adapter_without_state)


def error_report(errors: Mapping[str, float], relative_error: float) -> dict[str, Any]:
    """Return what a report says of an approximation."""
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:WORST]
    return {
        "relative_error": relative_error,
        "worst_module": f"{worst[0]} ({errors[worst[0]]:.3g})",
        "modules": dict(errors),
    }


def add_places(parser: argparse.ArgumentParser, **places: str) -> None:
    """Declare positional arguments, each with its help."""
    for name, text in places.items():
        parser.add_argument(name, metavar=name.upper(), help=text)


def dtype_of(name: str | None) -> Any:
    """Return the torch dtype that an option names."""
    import torch

    return {None: torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]
