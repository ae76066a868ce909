"""Micro-batches for tests of losses, from ragged lists."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatrain.train.loss import Loss, LossBatch

RELATIVE = 1e-6
"""Float64 on both sides: what remains is the order of sums."""


def ragged(lengths: Sequence[int], *, seed: int, scale: float = 1.0, shift: float = 0.0) -> Any:
    """Return a list of random lists, one number a label."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, generator=generator, dtype=torch.float64) * scale + shift).tolist()
        for n in lengths
    ]


def log_probabilities(lengths: Sequence[int], *, seed: int, scale: float = 1.0) -> Any:
    """Return a list of lists of numbers below 0."""
    return [[-abs(x) - 0.05 for x in row] for row in ragged(lengths, seed=seed, scale=scale)]


def make_batch(
    logps: Sequence[Sequence[float]],
    *,
    dtype: torch.dtype = torch.float64,
    **inputs: Sequence[Any],
) -> LossBatch:
    """Return a batch whose log-probabilities take gradients.

    An input is a list of rows, one number (or K) a label, or a list of numbers, one a datum.
    """
    flat = torch.tensor([x for row in logps for x in row], dtype=dtype, requires_grad=True)
    owner = torch.tensor([i for i, row in enumerate(logps) for _ in row], dtype=torch.int64)
    return LossBatch(flat, owner, len(logps), {k: flatten(v, dtype) for k, v in inputs.items()})


def flatten(values: Sequence[Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return one number a label from rows, or one a datum from numbers."""
    if values and isinstance(values[0], Sequence):
        values = [x for row in values for x in row]
    return torch.tensor(values, dtype=dtype)


def padded(rows: Sequence[Sequence[float]], fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return rows side by side, (B, T), and a mask: the form that TRL's trainers take."""
    width = max(map(len, rows))
    values = [[*row, *[fill] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(mask)


def value_and_gradient(loss: Loss, batch: LossBatch) -> tuple[Tensor, list[list[float]]]:
    """Return the loss's sum over its divisor, and its gradient as ragged lists."""
    lengths = [int((batch.sequence_N == i).sum()) for i in range(batch.num_sequences)]
    total, _ = loss(batch)
    value = total / loss.divisor(lengths)
    (gradient,) = torch.autograd.grad(value, batch.logps_N)
    return value.detach(), [part.tolist() for part in gradient.split(lengths)]


def reference_value_and_gradient(
    function: Callable[[Tensor], Tensor], rows: Sequence[Sequence[float]]
) -> tuple[Tensor, list[list[float]]]:
    """Return function(padded log-probabilities) and its gradient as ragged lists."""
    values, _ = padded(rows)
    values.requires_grad_()
    value = function(values)
    (gradient,) = torch.autograd.grad(value, values)
    return value.detach(), [g[: len(row)].tolist() for g, row in zip(gradient, rows, strict=True)]


def assert_same(
    ours: tuple[Tensor, list[list[float]]], theirs: tuple[Tensor, list[list[float]]]
) -> None:
    """Compare value and gradient; the gradient must not be 0 all over."""
    torch.testing.assert_close(ours[0].double(), theirs[0].double(), rtol=RELATIVE, atol=1e-9)
    mine, other = (torch.tensor([x for row in g for x in row]) for g in (ours[1], theirs[1]))
    assert other.abs().max() > 0
    torch.testing.assert_close(mine, other, rtol=RELATIVE, atol=1e-9)


def report(loss: Loss, batch: LossBatch) -> Mapping[str, float]:
    """Return the statistics as they are reported: sum / count."""
    _, statistics = loss(batch)
    assert set(statistics) == set(loss.statistics)
    return {name: float(total) / float(count) for name, (total, count) in statistics.items()}
