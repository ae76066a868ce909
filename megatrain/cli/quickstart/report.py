"""What a run says at its end: report.json, the plot of the loss, a summary on the terminal."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatrain.cli.quickstart.job import Job
from megatrain.errors import ExportError, StateError

ENDS = 5
"""Steps that loss_first and loss_last are means of, or fewer if there are fewer."""
MAX_LOGPROB_DIFFERENCE = 1e-5
SMOOTHING = 0.8
SHOWN_SAMPLES = 5
PACKAGES = ("megatrain", "torch", "megatron-core", "megatron-bridge", "transformers", "peft")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Contents of report.json."""

    layout: dict[str, int]
    versions: dict[str, str]
    loss_first: float
    """Mean over assistant tokens of the first steps."""
    loss_last: float
    max_logprob_difference: float
    tokens_per_second: float
    """All tokens of a batch over the time of a whole step; the median over steps."""
    adapter_path: str
    seed: int
    steps: int
    moe: bool
    correct_before: float
    """Share of held-out questions answered word for word by the base."""
    correct_after: float
    seconds: float
    """From the command's start to its report."""

    def write(self, path: Path) -> None:
        """Write report.json."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def build_report(
    job: Job,
    metrics: list[dict[str, float]],
    samples: list[dict[str, str]],
    *,
    difference: float,
    seconds: float,
) -> Report:
    """Sum up a run."""
    return Report(
        layout=job.mesh.to_dict(),
        versions={package: version(package) for package in PACKAGES},
        loss_first=mean_loss(metrics[:ENDS]),
        loss_last=mean_loss(metrics[-ENDS:]),
        max_logprob_difference=difference,
        tokens_per_second=median(step["tokens"] / step["seconds"] for step in metrics),
        adapter_path=str(job.adapter),
        seed=job.seed,
        steps=job.steps,
        moe=job.moe,
        correct_before=share_correct(samples, "before"),
        correct_after=share_correct(samples, "after"),
        seconds=seconds,
    )


def mean_loss(metrics: list[dict[str, float]]) -> float:
    """Return the mean over all label tokens of these steps."""
    total = sum(step["label_tokens"] for step in metrics)
    return sum(step["loss"] * step["label_tokens"] for step in metrics) / total


def share_correct(samples: list[dict[str, str]], key: str) -> float:
    """Return the share of samples that are what was wanted."""
    return fmean(sample[key] == sample["wanted"] for sample in samples)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return metrics.jsonl, one dict per step."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_report(report: Report) -> None:
    """Raise StateError when the loss did not fall, ExportError when the export is not exact."""
    difference = report.max_logprob_difference
    if not difference <= MAX_LOGPROB_DIFFERENCE:  # also when it is not a number
        raise ExportError(
            "the adapter in PEFT must give the trainer's log-probabilities: "
            f"largest difference {difference:.3g}, allowed {MAX_LOGPROB_DIFFERENCE:.0e}",
            hint=f"do not use {report.adapter_path}; please report this layout: {report.layout}",
        )
    if not report.loss_last < report.loss_first:
        raise StateError(
            f"the loss must fall: first {report.loss_first:.4f}, last {report.loss_last:.4f}, "
            f"steps={report.steps}",
            hint="give it more steps with --steps",
        )


def plot_loss(metrics: list[dict[str, float]], path: Path, *, title: str) -> None:
    """Draw the loss of every step and its smoothed course."""
    steps, raw = [step["step"] for step in metrics], [step["loss"] for step in metrics]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, raw, color="tab:blue", alpha=0.35, marker=".", label="loss of a batch")
    axes.plot(steps, smooth(raw), color="tab:blue", linewidth=2, label="smoothed")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss per assistant token (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def smooth(values: list[float]) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed


def print_summary(
    report: Report, job: Job, samples: list[dict[str, str]], console: Console
) -> None:
    """Show what changed, how exact the export is, and what was written."""
    table = Table(title="Held-out questions", title_justify="left", show_lines=True)
    for column in ("question", "base", "base + adapter", "wanted"):
        table.add_column(column, overflow="fold")
    for sample in samples[:SHOWN_SAMPLES]:
        table.add_row(*(escape(sample[key]) for key in ("question", "before", "after", "wanted")))
    console.print(table)
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(report, job):
        facts.add_row(f"[bold]{name}[/bold]", value)
    console.print(facts)


def _facts(report: Report, job: Job) -> list[tuple[str, Any]]:
    return [
        ("layout", f"{job.mesh.describe()}, {job.mesh.world_size} rank(s)"),
        ("loss", f"{report.loss_first:.3f} → {report.loss_last:.3f} in {report.steps} steps"),
        ("held out", f"{report.correct_before:.0%} → {report.correct_after:.0%} word for word"),
        (
            "export",
            f"largest log-probability difference to PEFT {report.max_logprob_difference:.2e}",
        ),
        ("speed", f"{report.tokens_per_second:,.0f} tokens/s"),
        ("time", f"{report.seconds:.0f} s"),
        ("written", f"{job.out}/{{base,adapter,metrics.jsonl,loss.png,report.json}}"),
    ]
