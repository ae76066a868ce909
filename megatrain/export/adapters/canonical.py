"""A PEFT file's factors under the checkpoint's names, one pair for each linear: what is trained.

Experts that Transformers fuses while it loads come apart again.  B's rows of the fused gate and up
are gate's and up's, and both keep the whole of A: exact, at the rank of the fused pair.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatrain.config.lora import LoraSpec, without_expert
from megatrain.errors import ExportError
from megatrain.export.adapters.experts import ExpertParts, name_in_checkpoint, parts_of
from megatrain.export.adapters.layers import Layer
from megatrain.export.adapters.peft_file import PeftFile
from megatrain.export.layout import PREFIX, overrides


@dataclass(frozen=True)
class Canonical:
    """Factors `<module>.lora_A` (r, in) and `.lora_B` (out, r), with the options that fit them."""

    spec: LoraSpec
    tensors: Mapping[str, Tensor]
    stacked: Mapping[str, ExpertParts]
    """By PEFT's path of a stacked layer: where its factors went."""
    renamed: Mapping[str, str]
    """PEFT's path of other layers that the checkpoint calls something else, by that name."""


def canonical(file: PeftFile, model_type: str | None) -> Canonical:
    """Return a file's factors by canonical names.

    Raises ExportError if experts are stacked and no model_type says what their checkpoint is like.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, tuple[int, float]] = {}
    stacked: dict[str, ExpertParts] = {}
    renamed: dict[str, str] = {}
    for layer in file.layers:
        if layer.kind == "stacked":
            parts = stacked[layer.path] = _parts(layer, model_type)
            for expert, (a, b) in enumerate(layer.pairs(file.tensors)):
                for module, rows in zip(parts.modules(expert), _rows(layer, parts, b), strict=True):
                    tensors[f"{module}.lora_A"] = a.clone()
                    tensors[f"{module}.lora_B"] = rows
                    numbers[without_expert(module)] = layer.rank, layer.alpha
        else:
            a, b = (file.tensors[key] for key in layer.keys)
            name = name_in_checkpoint(model_type, layer.path)
            if name != layer.path:
                renamed[name] = layer.path
            tensors |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
            _agree(numbers, without_expert(name), layer)
    return Canonical(_exact_spec(file.spec, numbers), tensors, stacked, renamed)


def from_canonical(
    tensors: Mapping[str, Tensor],
    stacked: Mapping[str, ExpertParts],
    *,
    renamed: Mapping[str, str],
    embeddings: Collection[str],
) -> dict[str, Tensor]:
    """Return factors under PEFT's keys again, stacked as they were.

    Raises ExportError if parts of one expert no longer share their A.
    """
    left, keys = dict(tensors), {}
    for path, parts in stacked.items():
        a, b = [], []
        for expert in range(sum(_is_first(name, parts) for name in tensors)):
            modules = parts.modules(expert)
            first = left[f"{modules[0]}.lora_A"]
            if not all(torch.equal(first, left[f"{each}.lora_A"]) for each in modules):
                raise ExportError(f"{modules} were stacked, and do not have one lora_A any more")
            a.append(first)
            b.append(torch.cat([left[f"{each}.lora_B"] for each in modules]))
            for each in modules:
                del left[f"{each}.lora_A"], left[f"{each}.lora_B"]
        keys[f"{PREFIX}{path}.lora_A.weight"] = torch.cat(a)
        keys[f"{PREFIX}{path}.lora_B.weight"] = torch.stack(b, dim=-1).flatten(1)
    for name, tensor in left.items():
        module, _, factor = name.rpartition(".lora_")
        suffix = f"embedding_{factor}" if module in embeddings else f"{factor}.weight"
        keys[f"{PREFIX}{renamed.get(module, module)}.lora_{suffix}"] = tensor
    return keys


def _is_first(name: str, parts: ExpertParts) -> bool:
    return name.startswith(f"{parts.owner}.") and name.endswith(f".{parts.leaves[0]}.lora_A")


def _parts(layer: Layer, model_type: str | None) -> ExpertParts:
    owner, _, parameter = layer.name.rpartition(".")
    if model_type is None:
        raise ExportError(
            f"{layer.name} is stacked, and the adapter's config does not say of which family it is",
            hint="--model-type says it: qwen3_moe, gpt_oss, ... as in the base's config.json",
        )
    return parts_of(model_type, owner, parameter)


def _rows(layer: Layer, parts: ExpertParts, b: Tensor) -> list[Tensor]:
    if b.shape[0] % len(parts.leaves):
        raise ExportError(
            f"{layer.path}: lora_B's rows are those of {', '.join(parts.leaves)}: {b.shape[0]} rows"
        )
    return [each.clone() for each in b.chunk(len(parts.leaves))]


def _agree(numbers: dict[str, tuple[int, float]], module: str, layer: Layer) -> None:
    mine = layer.rank, layer.alpha
    if numbers.setdefault(module, mine) != mine:
        raise ExportError(
            f"experts of {module} must have one rank and alpha: {numbers[module]} and {mine}"
        )


def _exact_spec(spec: LoraSpec, numbers: Mapping[str, tuple[int, float]]) -> LoraSpec:
    """Return the options with exactly these modules, and no pattern without an effect."""
    options: dict[str, Any] = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    ranks, alphas = ({name: each[i] for name, each in numbers.items()} for i in (0, 1))
    rank, alpha = (_most_common([*each.values()]) for each in (ranks, alphas))
    return LoraSpec(
        **options
        | {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": _of_experts(overrides(ranks, {}, rank)),
            "alpha_pattern": _of_experts(overrides(alphas, {}, alpha)),
            "target_modules": tuple(sorted(numbers)),
            "target_parameters": None,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "modules_to_save": None,
        }
    )


def _of_experts[T](patterns: Mapping[str, T]) -> dict[str, T]:
    """Let patterns of experts match with and without the expert's number."""
    return {re.sub(r"(^|\\\.)experts\\\.", _with_number, key): v for key, v in patterns.items()}


def _with_number(found: re.Match[str]) -> str:
    return rf"{found[1]}experts(\.\d+)?\."


def _most_common[T](values: list[T]) -> T:
    return max(dict.fromkeys(values), key=values.count)
