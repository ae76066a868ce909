"""What a run found, as rows: a table on a terminal, Markdown in a log, JSON in a file."""

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatrain.cli.bench.job import Job
from megatrain.cli.bench.race import HOPELESS, ROUNDS_FOR_ALL, Entrant, Outcome, median
from megatrain.config.estimate.work import Work

PACKAGES = (
    "megatrain",
    "torch",
    "megatron-core",
    "megatron-bridge",
    "transformer-engine",
    "transformers",
    "peft",
)

COLUMNS = {
    "system": "system",
    "forward": "forward tokens/s",
    "forward_backward": "forward+backward tokens/s",
    "step_seconds": "optimizer step s",
    "forward_bytes": "peak forward MB",
    "train_bytes": "peak forward+backward MB",
    "mfu": "MFU",
    "measured": "times",
}

FASTER = ("forward", "forward_backward", "mfu")
"""Columns in which more is better; in the others less is."""

BUSY = 0.25
"""Load average per core above which the table says that others used the machine."""

RATIO = "ours / best of peer"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; None where nothing was measured."""

    system: str
    forward: float | None
    """Tokens per second."""
    forward_backward: float | None
    """Tokens per second."""
    step_seconds: float | None
    forward_bytes: float | None
    train_bytes: float | None
    mfu: float | None
    """Of forward and backward."""
    measured: int
    """Repeats."""
    error: str | None = None


def rows(job: Job, outcome: Outcome, work: Work) -> list[Row]:
    """Return a row for each configuration, and the ratios last if there is a peer."""
    result = [_row(job, each, outcome, work) for each in outcome.entrants]
    if len(result) > 1:
        result.append(ratios(result[0], result[1:]))
    return result


def _row(job: Job, entrant: Entrant, outcome: Outcome, work: Work) -> Row:
    lengths = job.lengths()
    # On GPUs, figures are per device; the peer has one.
    on_cpu = outcome.started["ours"][0]["device"] == "cpu"
    devices = job.mesh.world_size if entrant.system == "ours" and not on_cpu else 1
    forward_of = entrant.forward_like or entrant
    forward_s, train_s = median(forward_of.forward), median(entrant.train)

    def speed(seconds: float | None) -> float | None:
        return sum(lengths) / seconds / devices if seconds else None

    mfu = None
    if train_s and outcome.gemm_flops_per_second:
        flops = work.lora_flops(lengths) / train_s / devices
        mfu = flops / outcome.gemm_flops_per_second
    return Row(
        system=entrant.name,
        forward=speed(forward_s),
        forward_backward=speed(train_s),
        step_seconds=median(entrant.train, "step_seconds"),
        forward_bytes=median(forward_of.forward, "bytes"),
        train_bytes=median(entrant.train, "bytes"),
        mfu=mfu,
        measured=len(entrant.train),
        error=entrant.error,
    )


def ratios(ours: Row, peers: Sequence[Row]) -> Row:
    """Return ours over the peer's best, which may be another configuration in each column."""

    def ratio(column: str) -> float | None:
        mine = getattr(ours, column)
        values = [getattr(each, column) for each in peers]
        known = [value for value in values if value is not None]
        if mine is None or not known:
            return None
        return float(mine / (max(known) if column in FASTER else min(known)))

    return Row(
        system=RATIO,
        forward=ratio("forward"),
        forward_backward=ratio("forward_backward"),
        step_seconds=ratio("step_seconds"),
        forward_bytes=ratio("forward_bytes"),
        train_bytes=ratio("train_bytes"),
        mfu=ratio("mfu"),
        measured=0,
    )


def cells(row: Row) -> list[str]:
    """Return a row as text, in the order of COLUMNS."""
    if row.error:
        return [row.system, row.error, *[""] * (len(COLUMNS) - 2)]
    return [row.system, *(_cell(row, column) for column in list(COLUMNS)[1:])]


def _cell(row: Row, column: str) -> str:
    value = getattr(row, column)
    if value is None or (column == "measured" and not value):
        return "-" if value is None else ""
    if row.system == RATIO:
        return f"{value:.2f}x"
    match column:
        case "measured":
            return str(value)
        case "step_seconds":
            return f"{value:.3f}"
        case "mfu":
            return f"{value:.1%}"
        case "forward_bytes" | "train_bytes":
            return f"{value / 1e6:,.0f}"
        case _:
            return f"{value:,.0f}"


def markdown(table: Sequence[Row]) -> str:
    """Return the table as Markdown."""
    return markdown_lines(list(COLUMNS.values()), [cells(row) for row in table])


def markdown_lines(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return any table as Markdown."""
    rule = "|".join(["---", *["---:"] * (len(heads) - 1)])
    whole = ["| " + " | ".join(heads) + " |", f"|{rule}|"]
    return "\n".join([*whole, *("| " + " | ".join(line) + " |" for line in lines)])


def show(table: Sequence[Row], notes: Sequence[str]) -> None:
    """Print the table and what must be known to read it."""
    show_lines(list(COLUMNS.values()), [cells(row) for row in table], notes)


def show_lines(heads: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """Print any table and its notes: ratios in bold on a terminal, else as Markdown."""
    if not sys.stdout.isatty():
        print(markdown_lines(heads, lines))
        print("\n" + "\n".join(f"- {note}" for note in notes))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table()
    for index, head in enumerate(heads):
        shown.add_column(head, justify="right" if index else "left")
    for line in lines:
        shown.add_row(*line, style="bold" if line[0] == RATIO else None)
    console = Console()
    console.print(shown)
    for note in notes:
        console.print(f"- {note}", highlight=False, markup=False)


def notes(job: Job, outcome: Outcome, work: Work) -> list[str]:
    """Return what must be known to read the table."""
    lengths, machine = job.lengths(), hardware(outcome)
    labels = sum(lengths) - len(lengths)
    lines = [
        f"{job.shape_name} ({job.shape.config_class}, {work.total_parameters / 1e6:,.1f} M "
        f"parameters, random weights), {job.dtype}, LoRA r{job.rank} on all linears",
        f"{len(lengths)} data of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all, "
        f"labels on {labels:,}; micro-batches of at most {job.max_tokens:,} tokens in both systems",
        f"{machine['device']}; {machine['cpu']}, {machine['cores']} cores, {job.threads} threads; "
        f"ours: layout {job.mesh.describe()}, back end {job.backend}",
        f"medians after a warm-up; a configuration of the peer over {HOPELESS:g} times as slow as "
        f"its best is measured {ROUNDS_FOR_ALL} times only; step: clipping, AdamW, zeroing",
        "MFU: 4 N_active FLOPs per token plus attention (no weight gradients, no recomputation); "
        f"N_active {work.active_parameters / 1e6:,.1f} M" + _peak(outcome),
        "peer: data sorted by length before padding, no mask for right padding, SDPA",
    ]
    if job.shape.is_moe:
        lines.append(
            "experts: ours trains gate and up with a factor each, PEFT one fused factor of double "
            "rank, through a parametrisation that forms each expert's whole delta"
        )
    if shared := shared_note(job.load_before, machine["cores"]):
        lines.append(
            f"{shared}, and a system that waits for threads suffers most{cpu_ratio(outcome)}"
        )
    return lines + [_agreement_note(each) for each in outcome.agreement]


def shared_note(load_before: float, cores: int) -> str | None:
    """Return what a table says of a machine that others used too, None if nobody did."""
    if load_before <= BUSY * cores:
        return None
    return (
        f"the machine was shared: load average {load_before:.1f} before the run began, so times "
        "are noisy"
    )


def cpu_ratio(outcome: Outcome) -> str:
    """Return the peer's best processor time over ours, as the end of a sentence."""
    if outcome.started["ours"][0]["device"] != "cpu":
        return ""
    kinds = {"forward": "forward", "train": "forward+backward"}
    found = []
    for kind, name in kinds.items():
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for each in outcome.entrants:
            value = median(getattr(each, kind), "cpu_seconds")
            if value:
                times[each.system].append(value)
        if times["ours"] and times["peer"]:
            found.append(f"{min(times['peer']) / times['ours'][0]:.2f}x {name}")
    return f"; by processor time ours / best of peer is {', '.join(found)}" if found else ""


def _peak(outcome: Outcome) -> str:
    rate = outcome.gemm_flops_per_second
    return f"; 100 % is {rate / 1e9:,.0f} GFLOP/s, a matrix product of this run" if rate else ""


def _agreement_note(difference: dict[str, Any]) -> str:
    return (
        f"same numbers as the peer ({difference['configuration']}): log-probabilities differ by at "
        f"most {difference['max_logprob_difference']:.1e} (mean "
        f"{difference['mean_logprob_difference']:.1e}), the loss by "
        f"{difference['loss_difference']:.1e}, the gradient's norm by "
        f"{difference['relative_grad_norm_difference']:.1e} of it"
    )


def to_json(job: Job, outcome: Outcome, work: Work, table: Sequence[Row]) -> dict[str, Any]:
    """Return everything, as plain values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "job": job.to_dict() | {"lengths": job.lengths(), "model": job.shape.fields},
        "hardware": hardware(outcome),
        "versions": versions(),
        "work": asdict(work),
        "gemm_flops_per_second": outcome.gemm_flops_per_second,
        "agreement": outcome.agreement,
        "trained_parameters": {
            name: sum(answer["num_parameters"] for answer in answers)
            for name, answers in outcome.started.items()
        },
        "rows": [asdict(row) for row in table],
        "measurements": [
            {"system": e.name, "check": e.check, "forward": e.forward, "train": e.train}
            for e in outcome.entrants
        ],
    }


def hardware(outcome: Outcome) -> dict[str, Any]:
    """Describe the machine."""
    return {
        "device": outcome.started["ours"][0]["device"],
        "torch_threads": {k: v[0]["torch_threads"] for k, v in outcome.started.items()},
        **machine(),
    }


def machine() -> dict[str, Any]:
    """Describe what any benchmark runs on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """Return what the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Return the versions of what takes part."""
    result: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = None
    return result
