"""An adapter of another rank: the best one where it shrinks, the same one where it grows."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.export.adapters.low_rank import compress, grow, product_norm
from megatrain.export.adapters.peft_file import PeftFile
from megatrain.export.adapters.rewrite import rewritten
from megatrain.export.peft_adapter import AdapterFiles


@dataclass(frozen=True)
class Resized:
    """The new files, and how far they are from the old ones, in Frobenius norms of B A."""

    files: AdapterFiles
    errors: dict[str, float]
    """Relative, by module; of all experts of a layer together."""
    relative_error: float
    """Of all modules together, each with its scale."""


def resize(file: PeftFile, rank: int, progress: Callable[[int], None]) -> Resized:
    """Return the adapter at `rank` for every linear, in the dtype it is stored in.

    No product B A is formed: the QR decompositions of the factors suffice.  Errors are those of
    what is returned, after its cast.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    errors, total, whole = {}, 0.0, 0.0
    for layer in file.layers:
        new = []
        error, norm = 0.0, 0.0
        for expert, (a, b) in enumerate(layer.pairs(file.tensors)):
            new.append(_resized(a, b, rank, f"{layer.path}.{expert}"))
            error += _distance((a, b), new[-1]) ** 2
            norm += product_norm(a, b) ** 2
            progress((a.numel() + b.numel()) * a.element_size())
        pairs[layer.path] = new
        errors[layer.path] = math.sqrt(error / norm) if norm else 0.0
        total += error * file.scale(layer) ** 2
        whole += norm * file.scale(layer) ** 2
    scales = {layer.path: file.scale(layer) for layer in file.layers}
    files = rewritten(file, pairs, scales, score=file.score)
    return Resized(files, errors, math.sqrt(total / whole) if whole else 0.0)


def distance(one: PeftFile, other: PeftFile) -> float:
    """Return how far another adapter of the same layers is: Frobenius, relative to the first."""
    total, whole = 0.0, 0.0
    others = {layer.path: layer for layer in other.layers}
    for layer in one.layers:
        theirs = others[layer.path].pairs(other.tensors)
        ratio = other.scale(others[layer.path]) / one.scale(layer)
        for mine, (c, d) in zip(layer.pairs(one.tensors), theirs, strict=True):
            total += (one.scale(layer) * _distance(mine, (c, d.double() * ratio))) ** 2
            whole += (one.scale(layer) * product_norm(*mine)) ** 2
    return math.sqrt(total / whole) if whole else math.sqrt(total)


def _resized(a: Tensor, b: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    old = a.shape[0]
    if rank == old:
        return a, b
    if rank > old:
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
        grown = grow(a, b, rank, seed=seed)
        return grown.a, grown.b
    small = compress(a, b, rank)
    return small.a.to(a.dtype), small.b.to(b.dtype)


def _distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Return the norm of the difference of two products; 0 if the second only adds zeros."""
    (a, b), (c, d) = one, other
    rank = a.shape[0]
    same = torch.equal(c[:rank], a) and torch.equal(d[:, :rank], b.to(d.dtype))
    if same and not d[:, rank:].any():
        return 0.0
    return product_norm(
        torch.cat([a.double(), c.double()]), torch.cat([b.double(), -d.double()], 1)
    )
