"""Inject a LoRA adapter at the linear layers of a model that is spread over ranks.

Which linears there are, and what Hugging Face calls them, comes from the one table of names.
Delta and base meet in a forward hook, so the base's modules and parameter names stay as they are.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.names import LocalParameter, ParameterTable, Part, parallel_kind
from megatrain.config.lora import LoraSpec
from megatrain.errors import ConfigError
from megatrain.model.adapter import Adapter
from megatrain.model.lora_linear import GroupedLoraLinear, LinearShape, LoraLinear, LoraPart

ShapeOf = Callable[[str], tuple[int, ...]]
"""From a Hugging Face parameter's name to its shape."""

BY_NAME_ONLY = ("embedding.", "output_layer.", ".router.")
"""Linears that `all-linear` does not mean, in Megatron's names."""


@dataclass
class ActiveAdapter:
    """Which adapter the next forward pass uses; shared by all hooks of a model."""

    name: str | None = None


def hf_module(parameter_name: str) -> str:
    """Return the Hugging Face module of a weight: its name without `.weight`."""
    return parameter_name.removesuffix(".weight")


def make_adapter(
    table: ParameterTable, spec: LoraSpec, *, seed: int, name: str, active: ActiveAdapter
) -> Adapter:
    """Create the adapter's factors beside their linears and initialise them.  No communication.

    Raises ConfigError, before anything has changed, for a target that matches no linear and for
    targets that cannot be trained together.
    """
    groups = _linears(table)
    chosen = {key: _chosen(parameters, spec, table) for key, parameters in groups.items()}
    check_targets(spec, table)
    linears = {}
    for key, parts_of in chosen.items():
        if any(parts_of):
            linears[key] = _build(table, groups[key], parts_of, spec)
    for key, linear in linears.items():
        _attach(groups[key][0], linear, name, active)
    adapter = Adapter(spec, seed, linears)
    adapter.reset()
    return adapter


def _linears(table: ParameterTable) -> dict[str, list[LocalParameter]]:
    """Return the weights of each Megatron linear here: one, or one for each local expert."""
    result: dict[str, list[LocalParameter]] = {}
    for parameter in table.parameters:
        tied_copy = parameter.local_name.startswith("output_layer.") and (
            parameter.global_name.startswith("embedding.")
        )
        if tied_copy:
            continue
        leaf = parameter.local_name.rpartition(".")[2]
        if re.fullmatch(r"weight\d*", leaf) and parameter.parameter.dim() == 2:
            key = f"{parameter.chunk}.{parameter.local_name.rpartition('.')[0]}"
            result.setdefault(key, []).append(parameter)
    return result


def _chosen(
    parameters: Sequence[LocalParameter], spec: LoraSpec, table: ParameterTable
) -> list[list[str]]:
    """Return, for each weight of a linear, the Hugging Face parameters that get factors."""
    return [
        [
            name
            for name in table.hf_names(parameter)
            if is_target(spec, name, parameter.global_name)
        ]
        for parameter in parameters
    ]


def is_target(spec: LoraSpec, hf_name: str, global_name: str) -> bool:
    """Tell whether the adapter has factors on this Hugging Face parameter."""
    module = hf_module(hf_name)
    if spec.is_all_linear:
        by_name_only = any(part in global_name for part in BY_NAME_ONLY)
        return not by_name_only and spec.chooses_layer_of(module) and not spec.excludes(module)
    return spec.matches(module)


def check_targets(spec: LoraSpec, table: ParameterTable) -> None:
    """Raise ConfigError for targets that match nothing in the whole model."""
    if spec.is_all_linear:
        return
    names = table.all_hf_modules()
    wanted = spec.target_modules or ()
    if isinstance(wanted, str):
        unmatched = [] if any(spec.matches(name) for name in names) else [wanted]
    else:
        unmatched = [
            target
            for target in wanted
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
    if unmatched:
        leaves = sorted({n.rpartition(".")[2] for n in names})
        raise ConfigError(
            f"lora targets matched no linear: {sorted(unmatched)}; the model has {leaves}"
        )


def _build(
    table: ParameterTable,
    parameters: Sequence[LocalParameter],
    chosen: Sequence[Sequence[str]],
    spec: LoraSpec,
) -> LoraLinear:
    first = parameters[0]
    shape = _shape(table, first)
    per_weight = [
        [p for p in _parts(table, parameter) if p.hf_name in names]
        for parameter, names in zip(parameters, chosen, strict=True)
    ]
    _check_experts(parameters, per_weight, spec)
    parts = []
    for same in zip(*per_weight, strict=True):
        modules = tuple(hf_module(part.hf_name) for part in same)
        parts.append(
            LoraPart(
                hf_modules=modules,
                rank=spec.rank_of(modules[0]),
                scale=spec.scale_of(modules[0]),
                rows=torch.from_numpy(same[0].rows),
                places=torch.from_numpy(same[0].places),
                out_features=table.hf_shape(same[0].hf_name)[0],
            )
        )
    kind = GroupedLoraLinear if shape.is_expert else LoraLinear
    return kind(shape, parts, spec.lora_dropout, like=first.parameter)


def _parts(table: ParameterTable, parameter: LocalParameter) -> list[Part]:
    names = table.hf_names(parameter)
    sizes = [table.hf_shape(name)[0] for name in names]
    if _kind(parameter) == "column":
        return table.parts(parameter, sizes)
    rows = torch.arange(parameter.parameter.shape[0]).numpy()
    return [Part(names[0], rows, rows)]


def _kind(parameter: LocalParameter) -> str:
    kind = parallel_kind(parameter)
    if kind == "special":
        raise ConfigError(
            f"lora cannot be put on {parameter.mapping.hf_param}: its mapping "
            f"({type(parameter.mapping).__name__}) is more than a split of rows",
            hint="leave it out with exclude_modules",
        )
    return kind


def _shape(table: ParameterTable, parameter: LocalParameter) -> LinearShape:
    out_features, in_features = parameter.parameter.shape
    groups = table.groups
    group = groups.expert_tp if parameter.is_expert else groups.tp
    return LinearShape(
        kind=_kind(parameter),
        is_expert=parameter.is_expert,
        in_features=in_features,
        out_features=out_features,
        tp_group=group,
        sequence_parallel=not parameter.is_expert and groups.mesh.tp > 1,
    )


def _check_experts(
    parameters: Sequence[LocalParameter], per_weight: Sequence[Sequence[Part]], spec: LoraSpec
) -> None:
    if not parameters[0].is_expert:
        return
    counts = {len(parts) for parts in per_weight}
    names = [hf_module(part.hf_name) for parts in per_weight for part in parts]
    places: Mapping[str, set[tuple[int, float]]] = {}
    for name in names:
        key = re.sub(r"\d+", "*", name.rpartition("experts.")[2])
        places.setdefault(key, set()).add((spec.rank_of(name), spec.scale_of(name)))  # type: ignore[attr-defined]
    if len(counts) > 1 or any(len(kinds) > 1 for kinds in places.values()):
        raise ConfigError(
            "the experts of one layer must have the same lora targets, rank and alpha: "
            f"{parameters[0].mapping.hf_param}"
        )
    leaves = {name.rpartition(".")[2] for name in names}
    if ("gate_proj" in leaves) != ("up_proj" in leaves):
        raise ConfigError(
            f"experts' gate_proj and up_proj must be targeted together: got {sorted(leaves)}",
            hint="Transformers holds them as one tensor, and PEFT refuses one without the other",
        )


def _attach(first: LocalParameter, linear: LoraLinear, name: str, active: ActiveAdapter) -> None:
    module = first.module
    if not hasattr(module, "lora"):
        module.lora = torch.nn.ModuleDict()
        if hasattr(module, "return_layernorm_output"):
            module.return_layernorm_output = True
        hook = _expert_hook if first.is_expert else _linear_hook
        module.register_forward_hook(_with_active(hook, active))
    module.lora[name] = linear


def _with_active(hook: Callable[..., Any], active: ActiveAdapter) -> Callable[..., Any]:
    def run(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        name = active.name
        lora = module.lora[name] if name is not None and name in module.lora else None
        return hook(lora, args, output)

    return run


def _linear_hook(lora: LoraLinear | None, args: tuple[Any, ...], output: Any) -> Any:
    out, bias = output
    x: Tensor = args[0]
    if isinstance(out, tuple):
        out, x = out
    return (out if lora is None else out + lora(x)), bias


def _expert_hook(lora: GroupedLoraLinear | None, args: tuple[Any, ...], output: Any) -> Any:
    out, bias = output
    x, counts = args
    return (out if lora is None else out + lora.forward_experts(x, counts)), bias
