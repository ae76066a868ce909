"""A process of its own that saves checkpoints until it is killed: python kill_tasks.py FOLDER."""

import itertools
import sys
from pathlib import Path

import torch

from megatrain.export.folder import replaced
from megatrain.export.state.folder import State
from megatrain.export.state.record import has_state
from tests.unit.export.state.made import record


def save(root: Path, number: int) -> None:
    """Replace `last` by a state whose tensors all hold its number, in many files."""
    batches = (
        (kind, {f"layer{i}.lora_A": torch.full((64, 1024), float(number))})
        for kind in ("master", "exp_avg")
        for i in range(10)
    )
    with replaced(root / "last", may_replace=has_state) as folder:
        State(record(step=number, saved_at=float(number)), batches).write(folder)


if __name__ == "__main__":
    for step in itertools.count(1):
        print(step, flush=True)
        save(Path(sys.argv[1]), step)
