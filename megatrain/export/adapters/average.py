"""The weighted sum of adapters with the same targets: exact at the sum of their ranks."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatrain.errors import ConfigError, ExportError
from megatrain.export.adapters.layers import Layer
from megatrain.export.adapters.peft_file import PeftFile
from megatrain.export.adapters.rewrite import rewritten
from megatrain.export.peft_adapter import AdapterFiles

Pair = tuple[Tensor, Tensor]


def average(
    files: Sequence[PeftFile], weights: Sequence[float], progress: Callable[[int], None]
) -> AdapterFiles:
    """Return one adapter whose B A, scaled, is the weighted sum of theirs.

    Scales and weights go into B: in the dtype it is stored in if that is exact, else all of the
    adapter is float32.  Keys and config are the first one's.

    Raises what check_averageable raises.
    """
    check_averageable(files, weights)
    pairs: dict[str, list[Pair]] = {}
    for layer in files[0].layers:
        pairs[layer.path] = _concatenated(files, weights, layer)
        progress(sum(2 * a.numel() * a.element_size() for a, _ in pairs[layer.path]))
    dtypes = {key: tensor.dtype for key, tensor in files[0].tensors.items()}
    if all(_is_exact(pairs[each.path], dtypes[each.keys[1]]) for each in files[0].layers):
        pairs = {
            each.path: [(a.to(dtypes[each.keys[0]]), b.to(dtypes[each.keys[1]])) for a, b in found]
            for each in files[0].layers
            for found in (pairs[each.path],)
        }
    scores = [each.score for each in files if each.score is not None]
    score = None
    if scores:
        summed = sum(w * each.double() for w, each in zip(weights, scores, strict=True))
        assert isinstance(summed, Tensor)
        score = summed.to(scores[0].dtype)
    return rewritten(files[0], pairs, dict.fromkeys(pairs, 1.0), score=score)


def check_averageable(files: Sequence[PeftFile], weights: Sequence[float]) -> None:
    """Raise unless these can be averaged.

    Raises:
        ExportError: targets or shapes differ.
        ConfigError: there is not one finite weight for each adapter.
    """
    if len(weights) != len(files) or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"there must be one finite weight for each adapter: {len(files)} adapters, "
            f"weights {list(weights)}"
        )
    for other in files[1:]:
        _check_same(files[0], other)


def _concatenated(files: Sequence[PeftFile], weights: Sequence[float], layer: Layer) -> list[Pair]:
    """Return, in float32 and for each expert, all A below one another and all B side by side."""
    found = []
    for file, weight in zip(files, weights, strict=True):
        own = next(each for each in file.layers if each.path == layer.path)
        factor = weight * file.scale(own)
        found.append([(a.float(), b.float() * factor) for a, b in own.pairs(file.tensors)])
    return [
        (torch.cat([a for a, _ in experts]), torch.cat([b for _, b in experts], 1))
        for experts in zip(*found, strict=True)
    ]


def _is_exact(pairs: Sequence[Pair], dtype: torch.dtype) -> bool:
    return all(torch.equal(each, each.to(dtype).float()) for pair in pairs for each in pair)


def _check_same(first: PeftFile, other: PeftFile) -> None:
    ours, theirs = (_outline(each) for each in (first, other))
    wrong = sorted(
        path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)
    )
    if wrong:
        raise ExportError(
            f"adapters can be averaged if their targets and shapes are the same: {len(wrong)} "
            f"differ: {', '.join(wrong[:5])}: {ours.get(wrong[0])} and {theirs.get(wrong[0])}"
        )
    if (first.score is None) != (other.score is None):
        raise ExportError("adapters can be averaged if all of them have a score head, or none")
    if first.carried.keys() != other.carried.keys() or not all(
        torch.equal(value, other.carried[key]) for key, value in first.carried.items()
    ):
        raise ExportError(
            f"the files hold different weights of the base: {sorted(first.carried)}",
            hint="they were made for different models",
        )


def _outline(file: PeftFile) -> dict[str, tuple[object, ...]]:
    return {
        each.path: (
            each.name,
            each.kind,
            each.num_experts,
            file.tensors[each.keys[0]].shape[1],
            file.tensors[each.keys[1]].shape[0],
        )
        for each in file.layers
    }
