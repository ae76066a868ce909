"""Low-rank arithmetic of one linear, in float32: no names, no files.

D (O, I) a difference of weights, A (r, I) and B (O, r) factors.  Errors are Frobenius norms.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.errors import ConfigError

EXACT_SIDE = 2048
"""A matrix whose smaller side is longer gets the randomised decomposition."""
OVERSAMPLING, ITERATIONS = 16, 4
"""Of the randomised decomposition; see Halko et al., https://arxiv.org/abs/0909.4061."""
BLOCK_BYTES = 1 << 22
"""Of float32 intermediates when a product is needed only piece by piece."""


@dataclass(frozen=True)
class Factors:
    """B A, and how far it is from what it stands for."""

    a: Tensor
    b: Tensor
    error: float
    """Norm of the difference."""
    norm: float
    """Norm of what it stands for."""

    @property
    def relative_error(self) -> float:
        """Return error / norm, 0 for nothing."""
        return self.error / self.norm if self.norm else 0.0


def check_rank(rank: int) -> None:
    """Raise ConfigError for a rank that no adapter has."""
    if rank < 1:
        raise ConfigError(f"--rank must be at least 1: {rank}")


def decompose(difference: Tensor, rank: int) -> Factors:
    """Return the best factors of rank `rank`, padded with zeros if the matrix has fewer.

    Above EXACT_SIDE they are close to the best; the error is measured, so it is theirs.
    """
    matrix = difference.float()
    side = min(matrix.shape)
    kept = min(rank, side)
    if side <= EXACT_SIDE:
        found = torch.linalg.svd(matrix.double(), full_matrices=False)
        u, s, vt = (each.float() for each in found)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(side, kept + OVERSAMPLING), niter=ITERATIONS)
        vt = v.T
    a, b = _split(u, s, vt, kept)
    a, b = pad(a, b, rank)
    return Factors(a, b, _distance(matrix, a, b), float(matrix.norm()))


def compress(a: Tensor, b: Tensor, rank: int) -> Factors:
    """Return the best factors of rank `rank` for B A, without ever forming the product."""
    a, b = a.double(), b.double()
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T)
    kept = min(rank, len(s))
    new_a, new_b = pad(*_split(q_b @ u, s, vt @ q_a.T, kept), rank)
    new_a, new_b, squares = new_a.float(), new_b.float(), s.square()
    return Factors(
        new_a, new_b, math.sqrt(float(squares[kept:].sum())), math.sqrt(float(squares.sum()))
    )


def grow(a: Tensor, b: Tensor, rank: int, *, seed: int) -> Factors:
    """Return factors of a larger rank with exactly the same product.

    New rows of A are Kaiming-uniform as PEFT's, new columns of B zero, so that all can be trained.
    """
    more = rank - a.shape[0]
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(a.shape[1])
    rows = torch.empty(more, a.shape[1]).uniform_(-bound, bound, generator=generator)
    return Factors(
        torch.cat([a, rows.to(a.dtype)]), torch.cat([b, b.new_zeros(len(b), more)], 1), 0.0, 1.0
    )


def pad(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of rank `rank` with the same product: zeros are added."""
    more = rank - a.shape[0]
    if more == 0:
        return a, b
    return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat(
        [b, b.new_zeros(b.shape[0], more)], 1
    )


def product_norm(a: Tensor, b: Tensor) -> float:
    """Return the norm of B A from the factors' Gram matrices, in float64."""
    a, b = a.double(), b.double()
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def _split(u: Tensor, s: Tensor, vt: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Give both factors the square root of the singular values."""
    root = s[:rank].sqrt()
    return (root[:, None] * vt[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def _distance(matrix: Tensor, a: Tensor, b: Tensor) -> float:
    rows = max(1, BLOCK_BYTES // (4 * matrix.shape[1]))
    return math.sqrt(
        sum(
            float((matrix[i : i + rows] - b[i : i + rows] @ a).double().square().sum())
            for i in range(0, matrix.shape[0], rows)
        )
    )
