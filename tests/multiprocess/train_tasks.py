"""What ranks do for the tests of `megatrain train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatrain.cli.train.job import run_joined
from megatrain.config.run import parse


def train(values: dict[str, Any], overrides: Sequence[str] = ()) -> int:
    """Run a configuration on ranks that have joined; return its exit status."""
    config = parse(values, overrides)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)  # the command's part
    return run_joined(config)
