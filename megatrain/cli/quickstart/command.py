"""The command `megatrain quickstart`: its options, and the order in which its processes run.

No torch in this process: the base, the ranks and the evaluation are processes of their own.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatrain.cli.quickstart.job import (
    DEFAULT_SEED,
    DEFAULT_STEPS,
    MARKER,
    RESULTS,
    Job,
    check_output_directory,
)
from megatrain.parallel.layout import DeviceMesh

if TYPE_CHECKING:
    from rich.console import Console

HELP = "train a LoRA adapter on a small model made on the spot, on CPU, and prove the export"

AXES = {
    "tp": (2, "tensor parallel ranks"),
    "pp": (1, "pipeline stages"),
    "cp": (1, "context parallel ranks"),
    "ep": (1, "expert parallel ranks, taken out of dp * cp * tp; needs --moe"),
    "dp": (1, "data parallel replicas"),
}
"""Default and meaning of each size of the layout."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command; `args.run` is the function that runs it."""
    parser = subparsers.add_parser("quickstart", help=HELP, description=HELP)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart"),
        metavar="DIR",
        help="where base, adapter, metrics, plot and report go (default: ./%(default)s)",
    )
    for axis, (default, meaning) in AXES.items():
        parser.add_argument(
            f"--{axis}",
            type=int,
            default=default,
            metavar="N",
            help=f"{meaning} (default: {default})",
        )
    parser.add_argument("--moe", action="store_true", help="a model with experts (Qwen3-MoE)")
    parser.add_argument(
        "--steps",
        type=int,
        default=DEFAULT_STEPS,
        metavar="N",
        help="optimizer steps (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, metavar="S", help="default: %(default)s"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status.  Raises MegatrainError for what a user can mend."""
    quickstart(build_job(args))
    return 0


def build_job(args: argparse.Namespace) -> Job:
    """Return what the options ask for.  Raises ConfigError or LayoutError; creates nothing."""
    job = Job(
        out=args.out.resolve(),
        mesh=DeviceMesh(**{axis: getattr(args, axis) for axis in AXES}),
        moe=args.moe,
        steps=args.steps,
        seed=args.seed,
    )
    check_output_directory(job.out)
    return job


def quickstart(job: Job) -> None:
    """Make the base, train, verify, report."""
    from rich.console import Console

    console, start = Console(), time.monotonic()
    path = str(prepare_directory(job))
    make_base(job, path, console)
    train(job, path, console)
    evaluate(job, path, console)
    summarize(job, console, seconds=time.monotonic() - start)


def prepare_directory(job: Job) -> Path:
    """Clear the results of an earlier run, keep its base; return the job file's path."""
    job.out.mkdir(parents=True, exist_ok=True)
    (job.out / MARKER).touch()
    for name in RESULTS:
        target = job.out / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    job.logs.mkdir()
    return job.write()


def make_base(job: Job, path: str, console: "Console") -> None:
    """Make the checkpoint unless a complete one of the same options is there."""
    from megatrain.cli.quickstart.child import Progress, python_module, run_child

    if job.has_base():
        console.print(f"1/3 base: {job.base} is there already")
        return
    console.print(f"1/3 base: making a small {'Qwen3-MoE' if job.moe else 'Qwen3'} checkpoint")
    run_child(
        python_module("megatrain.cli.quickstart.base_model", path),
        name="base",
        logs=job.logs,
        progress=Progress("base", job.base_metrics, job.base_steps),
    )


def train(job: Job, path: str, console: "Console") -> None:
    """Train the adapter on the job's ranks and export it."""
    from megatrain.cli.quickstart.child import Progress, run_child, torchrun

    ranks = job.mesh.world_size
    console.print(f"2/3 training: {ranks} rank(s), layout {job.mesh.describe()}, float32")
    run_child(
        torchrun("megatrain.cli.quickstart.train", path, world_size=ranks),
        name="train",
        logs=job.logs,
        processes=ranks,
        progress=Progress("train", job.metrics, job.steps),
    )


def evaluate(job: Job, path: str, console: "Console") -> None:
    """Compare the exported adapter with PEFT, and sample, in clean processes."""
    from megatrain.cli.quickstart.child import python_module, run_child

    console.print("3/3 evaluation: reloading the adapter in PEFT on the Hugging Face model")
    run_child(
        python_module("megatrain.cli.quickstart.evaluate", path),
        name="evaluation",
        logs=job.logs,
        progress=None,
    )


def summarize(job: Job, console: "Console", *, seconds: float) -> None:
    """Write loss.png and report.json, print the summary.  Raises when the run proved nothing."""
    from megatrain.cli.quickstart import report as reports

    metrics = reports.read_metrics(job.metrics)
    samples = json.loads(job.samples.read_text())
    difference = json.loads(job.verification.read_text())["max_logprob_difference"]
    report = reports.build_report(job, metrics, samples, difference=difference, seconds=seconds)
    report.write(job.out / "report.json")
    title = f"megatrain quickstart: LoRA r={job.lora_rank} on layout {job.mesh.describe()}"
    reports.plot_loss(metrics, job.out / "loss.png", title=title)
    reports.print_summary(report, job, samples, console)
    reports.check_report(report)
