"""Make a benchmark's checkpoint, or find it, in a process of its own."""

import subprocess
from pathlib import Path
from typing import Any

MODULE = "megatrain.cli.bench.checkpoint"


def make_checkpoint(job: Any, job_file: Path, *, module: str = MODULE) -> None:
    """Make what a job says, by a module that can be run.  Raises ChildFailedError."""
    from megatrain.cli.quickstart.child import ChildFailedError, first_failure, python_module

    command = python_module(module, str(job_file))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise first_failure(job.folder) or ChildFailedError(
            f"the checkpoint could not be made\n{done.stderr[-3000:].rstrip()}"
        )
