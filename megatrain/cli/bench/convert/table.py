"""What a run found, as lines of a table, notes, and JSON."""

import datetime
import statistics
from typing import Any

from megatrain.cli.bench import report
from megatrain.cli.bench.convert.job import ConvertJob
from megatrain.cli.bench.convert.race import PHASES, Outcome

HEADS = ("system", "seconds", "MB/s", "of cp -r", "peak memory MB", "of the bound")
NAMES = {"ours": "megatrain", "peer": "Megatron-Bridge"}
BOUND = 1.5
"""Memory of one of our processes, over the largest file or fused parameter."""


def bound(job: ConvertJob, outcome: Outcome) -> float:
    """Return the bytes that a process of ours may need."""
    return BOUND * max(outcome.largest_file, job.fused_bytes)


def lines(job: ConvertJob, outcome: Outcome) -> list[list[str]]:
    """Return one line for the copy, one for each system and direction, and the ratios."""
    copy, most = statistics.median(outcome.copies), bound(job, outcome)
    result = [["cp -r", f"{copy:.1f}", _rate(outcome, copy), "1.00x", "-", "-"]]
    for phase in PHASES:
        found = {}
        for name in NAMES:
            if answers := outcome.answers.get((name, phase)):
                seconds, growth = (_median(answers, key) for key in ("seconds", "growth"))
                found[name] = seconds, growth
                figures = [f"{seconds:.1f}", _rate(outcome, seconds), f"{seconds / copy:.2f}x"]
                memory = [f"{growth / 1e6:,.0f}", f"{growth / most:.2f}x"]
                result.append([f"{NAMES[name]}, {phase}", *figures, *memory])
        if len(found) == len(NAMES):
            time, memory_ratio = (a / b for a, b in zip(found["ours"], found["peer"], strict=True))
            ratio = [f"{time:.2f}x", "", "", f"{memory_ratio:.2f}x", ""]
            result.append([f"{phase}: ours / Bridge's", *ratio])
    return result


def notes(job: ConvertJob, outcome: Outcome) -> list[str]:
    """Return what must be known to read the table."""
    machine = report.machine()
    files = f"{outcome.num_bytes / 1e9:.2f} GB in files of at most {outcome.largest_file / 1e6:.0f}"
    found = [
        f"random weights in bf16, Qwen3's shape, {files} MB; medians of {job.repeats} round(s) "
        f"after a warm-up; ours on {job.workers} process(es)",
        f"{machine['cpu']}, {machine['cores']} cores",
        "all read from the page cache; ours and cp -r until all is on the disk (fsync)",
        "peak memory: growth of anonymous memory (RssAnon) of one process; the bound of ours is "
        f"{BOUND:g} times the largest file or fused parameter, {bound(job, outcome) / 1e6:,.0f} MB",
    ]
    if "peer" in outcome.same_bytes:
        same = "the same bytes" if outcome.same_bytes["peer"] else "OTHER bytes"
        found.append(
            "Megatron-Bridge: the parts of its import_ckpt and export_ckpt that need no CUDA: its "
            f"loader, Megatron's save and load, its writer; {same} came back, as from ours"
        )
    shared = report.shared_note(job.load_before, machine["cores"])
    return [*found, shared] if shared else found


def to_json(job: ConvertJob, outcome: Outcome) -> dict[str, Any]:
    """Return everything, as plain values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "job": job.to_dict(),
        "machine": report.machine(),
        "versions": report.versions(),
        "bytes": outcome.num_bytes,
        "largest_file": outcome.largest_file,
        "bound": bound(job, outcome),
        "copy_seconds": outcome.copies,
        "measurements": {f"{name} {phase}": a for (name, phase), a in outcome.answers.items()},
        "same_bytes": outcome.same_bytes,
        "table": [dict(zip(HEADS, line, strict=True)) for line in lines(job, outcome)],
    }


def _median(answers: list[dict[str, Any]], key: str) -> float:
    return statistics.median(float(answer[key]) for answer in answers)


def _rate(outcome: Outcome, seconds: float) -> str:
    return f"{outcome.num_bytes / 1e6 / seconds:,.0f}"
