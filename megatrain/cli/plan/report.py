"""Layouts as a table, or as plain lines where the output is no terminal."""

from collections.abc import Sequence
from typing import IO, Any

from megatrain.cli.plan.candidates import Candidate, Cluster
from megatrain.config.estimate import Estimate, human, render
from megatrain.parallel.layout import DeviceMesh

COLUMNS = ("layout", "memory", "weights", "optimizer", "activations", "s/step", "tokens/s", "")


def show(found: Sequence[Candidate], cluster: Cluster, total: int, out: IO[str]) -> None:
    """Print the layouts, the best one in full, and how to use it."""
    best = found[0]
    title = (
        f"{cluster.num_gpus} x {cluster.device}, {human(cluster.memory, 'B')} each: "
        f"{len(found)} of {total} layouts"
    )
    rows = [_row(each) for each in found]
    if out.isatty():
        _table(title, rows, out)
    else:
        print(title, file=out)
        for row in rows:
            print(
                "  ".join(f"{n} {v}".strip() for n, v in zip(COLUMNS, row, strict=True)), file=out
            )
    if not best.fits:
        print(
            "none fits: use more devices, a shorter --seq-length, a smaller --max-tokens, "
            "or LoRA instead of --full",
            file=out,
        )
        return
    lines = [f"best: {best.mesh.describe()}", *render(best.estimate), *toml(best)]
    print("\n".join(lines), file=out)
    print(command(cluster), file=out)


def toml(best: Candidate) -> list[str]:
    """Return the sections of a training configuration that choose this layout."""
    axes = {axis: size for axis, size in best.mesh.to_dict().items() if size > 1}
    training = best.estimate.training
    lines = ["", "[mesh]", *(f"{axis} = {size}" for axis, size in axes.items())]
    lines += ["", "[model]", f'mixed_precision = "{training.precision}"']
    lines += [f"max_tokens_per_microbatch = {training.microbatch}"]
    lines += ["recompute = true"] if training.recompute else []
    lines += ["", "[optimizer]", "offload_optimizer = true"] if training.offload_optimizer else []
    return [*lines, ""]


def command(cluster: Cluster) -> str:
    """Return the command line that starts training on these devices."""
    nodes = cluster.num_gpus // cluster.per_node
    if nodes == 1:
        return f"megatrain train CONFIG.toml --nproc {cluster.num_gpus}"
    return (
        f"torchrun --nnodes {nodes} --nproc-per-node {cluster.per_node} "
        "--rdzv-backend c10d --rdzv-endpoint HOST:PORT -m megatrain train CONFIG.toml"
    )


def _row(candidate: Candidate) -> list[str]:
    found: Estimate = candidate.estimate
    fullest = max(found.ranks, key=lambda rank: rank.peak)
    mesh: DeviceMesh = candidate.mesh
    return [
        mesh.describe() + (" recompute" if found.training.recompute else ""),
        human(found.peak, "B"),
        human(fullest.weights, "B"),
        human(fullest.optimizer + fullest.gradients, "B"),
        human(fullest.activations + fullest.workspace, "B"),
        f"{found.seconds_per_step:.3g}",
        human(found.tokens_per_second or 0.0),
        "fits" if candidate.fits else "too big",
    ]


def _table(title: str, rows: Sequence[Sequence[str]], out: IO[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table: Any = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("layout", "") else "right")
    for row in rows:
        table.add_row(*row)
    Console(file=out).print(table)
