"""A PEFT file with other factors in the same layout: the config's numbers follow the factors."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatrain.errors import ExportError
from megatrain.export.adapters.layers import Layer
from megatrain.export.adapters.peft_file import PeftFile
from megatrain.export.layout import PREFIX, overrides
from megatrain.export.peft_adapter import AdapterFiles
from megatrain.model.score import SCORE

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(A, B) of each expert of a layer, or of its only linear."""


def rewritten(
    file: PeftFile,
    pairs: Mapping[str, Pairs],
    scales: Mapping[str, float],
    *,
    score: Tensor | None,
) -> AdapterFiles:
    """Return a file's config and layout with these factors and scales, by the layer's path.

    Raises ExportError where PEFT could not be told a rank or scale.
    """
    ranks: Counter[str] = Counter()
    layer_scales: dict[str, float] = {}
    seen: set[tuple[str, str]] = set()
    for layer in file.layers:
        part = (layer.name, re.sub(r"\.experts\.\d+\.", ".experts.", layer.path))
        if part not in seen:
            ranks[layer.name] += pairs[layer.path][0][0].shape[0]
            seen.add(part)
        if layer_scales.setdefault(layer.name, scales[layer.path]) != scales[layer.path]:
            raise ExportError(f"PEFT has one scale for all of {layer.name}")
    alphas = {
        name: _alpha(layer_scales[name], rank, rslora=file.spec.use_rslora)
        for name, rank in ranks.items()
    }
    weights: dict[str, Tensor] = {}
    for layer in file.layers:
        weights |= _weights(layer, pairs[layer.path])
    weights |= {PREFIX + key: tensor for key, tensor in file.carried.items()}
    if score is not None:
        weights[PREFIX + SCORE] = score
    return AdapterFiles({**file.config, **_numbers(ranks, alphas)}, weights)


def _numbers(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, object]:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    patterns = overrides(ranks, {}, rank), overrides(alphas, {}, alpha)
    lost = [each for found in patterns for each in found if re.search(r"(^|\\\.)\d+\\\.", each)]
    if any(re.search(r"\.experts\.\d+\.", name) for name in ranks) and lost:
        raise ExportError(
            "PEFT takes one rank and alpha for all experts that its config names in "
            f"target_modules: {lost[:3]} differ",
            hint="import the adapter and export it: its experts are then in target_parameters",
        )
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": patterns[0],
        "alpha_pattern": patterns[1],
    }


def _alpha(scale: float, rank: int, *, rslora: bool) -> float:
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    near = round(alpha)  # sqrt(8) * (8 / sqrt(8)) is not quite 8
    return near if near and math.isclose(alpha, near, rel_tol=1e-12) else alpha


def _weights(layer: Layer, pairs: Pairs) -> dict[str, Tensor]:
    if layer.kind == "stacked":
        a = torch.cat([a for a, _ in pairs])
        b = torch.stack([b for _, b in pairs], dim=-1).flatten(1)
    else:
        ((a, b),) = pairs
    return dict(zip(layer.keys, (a.contiguous(), b.contiguous()), strict=True))
