"""Which tensors of a base checkpoint an adapter adds to: by the base's config and tensor names."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatrain.errors import ExportError
from megatrain.export.adapters.delta import Delta, Deltas, check_fits
from megatrain.export.adapters.layers import Layer
from megatrain.export.adapters.peft_file import PeftFile
from megatrain.export.attach import attach
from megatrain.export.layout import PREFIX
from megatrain.export.skeleton import Skeleton

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
"""The end of its name."""
ALL = (-1, 0)
"""Stands for (expert, part) of a tensor that holds all experts."""
type Shapes = Mapping[str, tuple[int, ...]]


def deltas_of(file: PeftFile, hf_config: dict[str, Any], shapes: Shapes) -> Deltas:
    """Return what an adapter adds, after PEFT was asked whether it takes it for this base.

    `shapes` are those of the base's tensors; a tied head counts as a tensor of its own.
    Raises ExportError if the adapter does not fit.
    """
    if file.score is not None:
        raise ExportError(
            "a score head cannot be merged into a causal language model",
            hint="it is a weight of its own: score.weight in the adapter's file",
        )
    skeleton = Skeleton(hf_config)
    weights: dict[str, Tensor] = dict(file.tensors)
    weights |= {PREFIX + key: tensor for key, tensor in file.carried.items()}
    scales = attach(skeleton.model, file.config, weights)
    sources, deltas = _sources(skeleton, shapes), Deltas()
    for layer in file.layers:
        scale = file.scale(layer)
        known = scales.get(layer.path, scale)
        if not math.isclose(known, scale, rel_tol=1e-12):
            raise ExportError(f"PEFT scales {layer.path} by {known}, its config by {scale}")
        for expert, (a, b) in enumerate(layer.pairs(file.tensors)):
            delta = Delta(a, b, scale, is_transposed=layer.kind == "embedding")
            if layer.kind == "stacked":
                _add_expert(deltas, skeleton, sources, layer.name, expert, delta)
            else:
                deltas.add(_tensor_of(layer, sources, shapes), delta)
    check_fits(deltas, shapes)
    return deltas


def _sources(skeleton: Skeleton, shapes: Shapes) -> dict[str, dict[tuple[int, int], str]]:
    """Return, by the path of a parameter of Transformers' model, its tensors in the checkpoint."""
    result: dict[str, dict[tuple[int, int], str]] = {}
    for name, shape in shapes.items():
        if len(shape) == 3:
            result.setdefault(skeleton.renamed(name), {})[ALL] = name
        elif len(shape) == 2 and name.endswith(".weight"):
            with contextlib.suppress(ExportError):
                place = skeleton.place(name.removesuffix(".weight"))
                result.setdefault(place.path, {})[place.expert, place.part] = name
    return result


def _tensor_of(
    layer: Layer, sources: Mapping[str, Mapping[tuple[int, int], str]], shapes: Shapes
) -> str:
    name = f"{layer.path}.weight"
    return name if name in shapes else sources.get(name, {}).get((0, 0), name)


def _add_expert(
    deltas: Deltas,
    skeleton: Skeleton,
    sources: Mapping[str, Mapping[tuple[int, int], str]],
    parameter: str,
    expert: int,
    delta: Delta,
) -> None:
    """Add to one matrix of a stacked tensor, or to the tensors that the parameter is fused from."""
    own = sources.get(parameter, {})
    parts = [own[each] for each in sorted(own) if each[0] == expert]
    if ALL in own:
        owner = skeleton.module(parameter.rpartition(".")[0])
        turned = bool(getattr(owner, "is_transposed", False))
        deltas.add(own[ALL], replace(delta, expert=expert, is_transposed=turned))
        return
    if not parts or delta.b.shape[0] % len(parts):
        raise ExportError(f"the base has no tensor for expert {expert} of {parameter}")
    for name, b in zip(parts, delta.b.chunk(len(parts)), strict=True):
        deltas.add(name, replace(delta, b=b))
