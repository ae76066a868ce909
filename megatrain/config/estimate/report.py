"""An estimate as lines of plain text."""

from megatrain.config.estimate.memory import RankMemory
from megatrain.config.estimate.result import Estimate

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

PARTS = ("weights", "gradients", "optimizer", "activations", "workspace", "overhead")


def human(value: float, unit: str = "") -> str:
    """Return a number with three digits and a prefix: 1.23 G."""
    for size, prefix in UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def render(result: Estimate) -> list[str]:
    """Return the lines that a dry run prints."""
    p = result.parameters
    lines = [
        f"model: {result.shape.model_type}, {human(p.total)} parameters, "
        f"{human(p.active)} active, {human(p.trained)} trained",
        f"work: {human(result.flops_per_token, 'FLOP')} a token, "
        f"{human(result.tokens_per_step)} tokens a step",
    ]
    lines += [_rank_line(rank, len(result.ranks)) for rank in result.ranks]
    if result.time is not None and result.tokens_per_second is not None:
        time = result.time
        lines.append(
            f"time: {time.total:.3g} s a step, {human(result.tokens_per_second)} tokens/s "
            f"(compute {time.compute:.3g} s, waiting {time.bubble:.3g} s, "
            f"messages {time.communication:.3g} s, gradients {time.gradients:.3g} s)"
        )
    return lines


def _rank_line(rank: RankMemory, num_stages: int) -> str:
    name = "memory of a rank" if num_stages == 1 else f"memory of a rank of stage {rank.stage}"
    parts = [f"{part} {human(getattr(rank, part), 'B')}" for part in PARTS if getattr(rank, part)]
    peak = f"{name}: {human(rank.peak, 'B')} at most ({', '.join(parts)}"
    if rank.step_workspace > rank.activations + rank.workspace:
        peak += f"; in the optimizer step {human(rank.step_workspace, 'B')} instead of activations"
    return f"{peak})" + (f", and {human(rank.host, 'B')} of the host's" if rank.host else "")
