"""The base of `megatrain serve --demo`: quickstart's, made if it is not there."""

from pathlib import Path

from megatrain.cli.quickstart.command import make_base, prepare_directory
from megatrain.cli.quickstart.job import DEFAULT_SEED, DEFAULT_STEPS, Job, check_output_directory
from megatrain.parallel.layout import DeviceMesh


def demo_job(out: Path) -> Job:
    """Return the job of quickstart whose base is served.  Raises ConfigError."""
    job = Job(out=out, mesh=DeviceMesh(), moe=False, steps=DEFAULT_STEPS, seed=DEFAULT_SEED)
    check_output_directory(job.out)
    return job


def demo_base(job: Job) -> None:
    """Make the base of a job; what quickstart has left beside it stays."""
    if job.has_base():
        return
    from rich.console import Console

    make_base(job, str(prepare_directory(job)), Console(stderr=True))
