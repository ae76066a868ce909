"""From canonical LoRA factors to PEFT's keys and back, exactly.

Canonical: `<checkpoint's module path>.lora_A` (r, in) and `.lora_B` (out, r), for an expert as for
any other module; for an embedding A is (r, vocabulary) and B (hidden, r).

What PEFT 0.21 does with Transformers 5, and what is therefore written:

- Experts that Transformers fuses while loading (Qwen3-MoE, DeepSeek-V3, GLM-4-MoE, Mixtral) stay
  2-D per expert.  PEFT stacks them, gate and up as one block-diagonal factor of rank r_gate + r_up.
  It would take that factor's rank, alpha and layers from `r` and `lora_alpha` alone: wrong under
  rsLoRA (by sqrt 2), rank_pattern, alpha_pattern and layers_to_transform.  And a `gate_proj` in
  target_modules no longer means dense layers and shared experts, whose weights it drops unsaid.
  So full names go into target_parameters, and the fused rank and alpha into the patterns.
- Without down_proj PEFT looks for the fused factor under another key than its own conversion
  gives; gate and up alone are therefore written stacked.
- Experts that are 3-D in the checkpoint (gpt-oss) are stacked: A (E*r, in), expert by expert;
  B (out, r*E) with the expert index fastest.  Of several parameters of one module the last is
  outermost, and each earlier one has one more `.base_layer` in its key.
- Routers, and linear layers whose name PEFT would take for an expert's, are 2-D target_parameters.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.config.lora import LoraSpec, look_up
from megatrain.errors import ExportError
from megatrain.export.skeleton import Place, Skeleton

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Layer:
    """One LoRA layer of PEFT's: the modules it holds, by (expert, part), and its numbers."""

    place: Place
    modules: Mapping[tuple[int, int], str]
    key: str
    """Path of the layer in the PEFT model."""
    rank: int
    alpha: float
    stacked: bool

    @property
    def is_parameter(self) -> bool:
        """Whether PEFT finds it by target_parameters."""
        return self.place.kind not in ("linear", "embedding")

    @property
    def name(self) -> str:
        """The name by which PEFT matches targets and patterns."""
        return self.place.path if self.is_parameter else self.place.owner


def plan(skeleton: Skeleton, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> list[Layer]:
    """Group canonical factors into PEFT's layers.

    Raises:
        ExportError: a factor is missing, has no place, or does not fit its neighbours.
    """
    groups: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    places: dict[str, Place] = {}
    for module in _modules(tensors):
        place = skeleton.place(module)
        groups[place.path][place.expert, place.part] = module
        places.setdefault(place.path, place)
    return [_layer(skeleton, spec, tensors, places, groups[path], path) for path in places]


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
    factors: dict[str, set[str]] = defaultdict(set)
    for name in tensors:
        module, _, factor = name.rpartition(".")
        if factor not in ("lora_A", "lora_B"):
            raise ExportError(
                f"not the name of a LoRA factor: {name}", hint="<module>.lora_A or <module>.lora_B"
            )
        factors[module].add(factor)
    if alone := sorted(module for module, found in factors.items() if len(found) < 2):
        raise ExportError(f"lora_A or lora_B is missing: {', '.join(alone[:5])}")
    if not factors:
        raise ExportError("an adapter needs at least one module: none was given")
    return sorted(factors)


def _layer(
    skeleton: Skeleton,
    spec: LoraSpec,
    tensors: Mapping[str, Tensor],
    places: Mapping[str, Place],
    modules: Mapping[tuple[int, int], str],
    path: str,
) -> Layer:
    place = places[path]
    siblings = [
        each for each in skeleton.parameters_of(place.owner) if f"{place.owner}.{each}" in places
    ]
    if place.kind in ("part", "expert"):
        _check_experts(skeleton, place, modules)
    ranks = _ranks(spec, tensors, place, modules)
    scales = {spec.scale_of(module) for module in modules.values()}
    if len(scales) > 1:
        raise ExportError(
            f"PEFT has one scale for all of {path}, found {sorted(scales)}",
            hint="give the same alpha and rank to gate, up and every expert of a layer",
        )
    alpha, first = spec.alpha_of(modules[min(modules)]), ranks[0]
    ratio = sum(ranks) / first
    alpha *= math.sqrt(ratio) if spec.use_rslora else ratio
    nested = len(siblings) - 1 - siblings.index(place.parameter)
    parts = {places[f"{place.owner}.{each}"].kind for each in siblings} == {"part"}
    return Layer(
        place=place,
        modules=modules,
        key=place.owner + ".base_layer" * nested,
        rank=sum(ranks),
        alpha=int(alpha) if float(alpha).is_integer() else alpha,
        stacked=place.kind in ("part", "expert") and not (parts and _converts(siblings)),
    )


def _converts(siblings: list[str]) -> bool:
    """Return whether PEFT's conversion gives the keys that PEFT's own nesting needs."""
    return siblings[-1] == "down_proj" and siblings in (
        ["gate_up_proj", "down_proj"],
        ["down_proj"],
    )


def _check_experts(
    skeleton: Skeleton, place: Place, modules: Mapping[tuple[int, int], str]
) -> None:
    num_experts = skeleton.parameters_of(place.owner)[place.parameter][0]
    wanted = {(e, part) for e in range(num_experts) for part in range(place.num_parts)}
    if wanted != set(modules):
        wrong = sorted(wanted ^ set(modules))
        raise ExportError(
            f"{place.path} holds {place.num_parts} part(s) of {num_experts} experts: adapt all of "
            f"them or none: (expert, part) missing or too many: {wrong[:5]}",
            hint="PEFT refuses gate_proj without up_proj; adapt both, in every expert",
        )


def _ranks(
    spec: LoraSpec,
    tensors: Mapping[str, Tensor],
    place: Place,
    modules: Mapping[tuple[int, int], str],
) -> list[int]:
    ranks: list[set[int]] = [set() for _ in range(place.num_parts)]
    for (_, part), module in modules.items():
        a, b, rank = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"], spec.rank_of(module)
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            raise ExportError(
                f"{module}: lora_A must be (r, in) and lora_B (out, r): r={rank}, "
                f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}"
            )
        ranks[part].add(rank)
    if any(len(each) != 1 for each in ranks):
        raise ExportError(f"all experts of {place.path} must have one rank: {ranks}")
    return [each.pop() for each in ranks]


def to_peft(layer: Layer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one layer under PEFT's keys."""
    if layer.stacked:
        return _stack(layer, tensors)
    keys = {}
    for module in layer.modules.values():
        path = module if layer.place.kind == "part" else layer.key
        for factor in "AB":
            suffix = f"lora_{factor}.weight"
            if layer.place.kind == "embedding":
                suffix = f"lora_embedding_{factor}"
            keys[f"{PREFIX}{path}.{suffix}"] = tensors[f"{module}.lora_{factor}"]
    return keys


def _stack(layer: Layer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = range(layer.place.num_parts)
    experts = sorted({expert for expert, _ in layer.modules})
    a, b = [], []
    for expert in experts:
        names = [layer.modules[expert, part] for part in parts]
        a.append(torch.cat([tensors[f"{name}.lora_A"] for name in names]))
        b.append(torch.block_diag(*[tensors[f"{name}.lora_B"] for name in names]))
    return {
        f"{PREFIX}{layer.key}.lora_A.weight": torch.cat(a),
        f"{PREFIX}{layer.key}.lora_B.weight": torch.stack(b, dim=-1).flatten(1),
    }


def unstack(a: Tensor, b: Tensor, *, num_experts: int) -> list[tuple[Tensor, Tensor]]:
    """Return (lora_A, lora_B) of each expert."""
    a_experts = a.reshape(num_experts, -1, a.shape[-1])
    b_experts = b.reshape(b.shape[0], -1, num_experts)
    return [(a_experts[e].clone(), b_experts[..., e].clone()) for e in range(num_experts)]


def patterns(spec: LoraSpec, layers: list[Layer]) -> tuple[dict[str, int], dict[str, float]]:
    """Return rank_pattern and alpha_pattern that give PEFT the numbers of every layer.

    The user's own stay; what PEFT would get wrong by them is put in front.
    """
    ranks = {layer.name: layer.rank for layer in layers}
    alphas = {layer.name: layer.alpha for layer in layers}
    return (
        overrides(ranks, spec.rank_pattern, spec.r),
        overrides(alphas, spec.alpha_pattern, spec.lora_alpha),
    )


def overrides[T](wanted: Mapping[str, T], user: Mapping[str, T], default: T) -> dict[str, T]:
    """Return patterns that give each name its value; `user` has patterns that stay behind them."""
    tails: dict[str, list[str]] = defaultdict(list)
    for name in wanted:
        tails[".".join(name.split(".")[-2:])].append(name)
    front: dict[str, T] = {}
    for tail, names in tails.items():
        other = [name for name in names if look_up(user, name, default) != wanted[name]]
        if other and len({wanted[name] for name in names}) == 1:
            front[re.escape(tail)] = wanted[names[0]]
        else:
            front |= {re.escape(name): wanted[name] for name in other}
    return front | {key: value for key, value in user.items() if key not in front}
