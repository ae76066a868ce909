"""Inject a LoRA adapter at the linear layers of a model that is spread over ranks.

Which linears there are, and what Hugging Face calls them, comes from the one table of names.
Delta and base meet in a forward hook, so the base's modules and parameter names stay as they are.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from megatrain.checkpoint.names import LocalParameter, ParameterTable, Part, parallel_kind
from megatrain.config.lora import LoraSpec, look_up, without_expert
from megatrain.errors import ConfigError
from megatrain.model.adapter import Adapter
from megatrain.model.lora_linear import (
    EmbeddingLora,
    GroupedLoraLinear,
    LinearShape,
    LoraLinear,
    LoraPart,
)
from megatrain.model.mixed_lora import MixedLora, mixed
from megatrain.model.mixture import ActiveAdapters

BY_NAME_ONLY = ("embedding.", "output_layer.", ".router.")
"""Linears that `all-linear` does not mean, in Megatron's names."""


def hf_module(hf_name: str, parameter: LocalParameter) -> str:
    """Return the Hugging Face module of a weight: its name without `.weight`.

    An expert of a tensor that holds all of them is called as if it were a module of its own:
    `...experts.3.gate_up_proj`.
    """
    module = hf_name.removesuffix(".weight")
    if parameter.is_expert and module == hf_name:
        expert = parameter.global_name.rpartition("weight")[2]
        prefix, _, leaf = module.rpartition(".")
        return f"{prefix}.{expert}.{leaf}"
    return module


def make_adapter(
    table: ParameterTable, spec: LoraSpec, *, seed: int, name: str, active: ActiveAdapters
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


def targets_of(table: ParameterTable, spec: LoraSpec) -> dict[str, tuple[int, float]]:
    """Return rank and scale by Hugging Face module, of what the options adapt on this rank."""
    return {
        module: (spec.rank_of(module), spec.scale_of(module))
        for parameters in _linears(table).values()
        for parameter in parameters
        for name in table.hf_names(parameter)
        if is_target(spec, module := hf_module(name, parameter), parameter.global_name)
    }


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
            if is_target(spec, hf_module(name, parameter), parameter.global_name)
        ]
        for parameter in parameters
    ]


def is_target(spec: LoraSpec, module: str, global_name: str) -> bool:
    """Tell whether the adapter has factors on this Hugging Face module."""
    if spec.is_all_linear:
        by_name_only = any(part in global_name for part in BY_NAME_ONLY)
        return not by_name_only and spec.chooses_layer_of(module) and not spec.excludes(module)
    return spec.matches(module)


def check_targets(spec: LoraSpec, table: ParameterTable) -> None:
    """Raise ConfigError for targets that match nothing in the whole model."""
    modules = table.all_hf_modules()
    names = {*modules, *map(without_expert, modules)}
    wanted = () if spec.is_all_linear else spec.target_modules or ()
    if isinstance(wanted, str):
        unmatched = [] if any(spec.matches(name) for name in names) else [wanted]
    else:
        unmatched = [
            target
            for target in wanted
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
    parameters = {*table.hf_shapes, *names}
    unmatched += [
        target
        for target in spec.target_parameters or ()
        if not any(name == target or name.endswith(f".{target}") for name in parameters)
    ]
    if unmatched:
        leaves = sorted({n.rpartition(".")[2] for n in names})
        raise ConfigError(
            f"lora targets matched no linear: {sorted(unmatched)}; the model has {leaves}"
        )
    _check_choice(spec, modules)


def _check_choice(spec: LoraSpec, modules: Sequence[str]) -> None:
    """Raise ConfigError if layers or exclusions leave nothing, or a pattern has no effect."""
    if spec.is_all_linear:
        chosen = [m for m in modules if spec.chooses_layer_of(m) and not spec.excludes(m)]
    else:
        chosen = [m for m in modules if spec.matches(m)]
    if not chosen:
        raise ConfigError(
            "the adapter must have at least one linear: layers_to_transform="
            f"{spec.layers_to_transform} and exclude_modules={spec.exclude_modules} leave none"
        )
    names = {spec.pattern_name(each) for m in chosen for each in (m, without_expert(m))}
    for option, patterns in (("rank", spec.rank_pattern), ("alpha", spec.alpha_pattern)):
        idle = [key for key in patterns if not any(look_up({key: True}, n, False) for n in names)]
        if idle:
            raise ConfigError(f"{option}_pattern has keys that match no target: {idle}")
    if (
        spec.lora_dropout
        and any(re.search(r"(^|\.)lm_head$", m) for m in chosen)
        and (not spec.is_all_linear)
    ):
        raise ConfigError(
            f"dropout in front of the output layer's adapter is not supported: "
            f"lora_dropout={spec.lora_dropout}",
            hint="leave lm_head out, or set lora_dropout=0",
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
        [
            (hf_module(part.hf_name, parameter), part)
            for part in _parts(table, parameter)
            if part.hf_name in names
        ]
        for parameter, names in zip(parameters, chosen, strict=True)
    ]
    if shape.is_expert:
        _check_experts([[module for module, _ in parts] for parts in per_weight], spec)
    parts = []
    for same in zip(*per_weight, strict=True):
        modules = tuple(module for module, _ in same)
        part = same[0][1]
        parts.append(
            LoraPart(
                hf_modules=modules,
                rank=spec.rank_of(modules[0]),
                scale=spec.scale_of(modules[0]),
                rows=torch.from_numpy(part.rows),
                places=torch.from_numpy(part.places),
                out_features=part.out_features,
            )
        )
    kind: type[LoraLinear] = GroupedLoraLinear if shape.is_expert else LoraLinear
    if shape.kind == "embedding":
        kind = EmbeddingLora
    return kind(shape, parts, spec.lora_dropout, like=first.parameter)


def _parts(table: ParameterTable, parameter: LocalParameter) -> list[Part]:
    kind = parallel_kind(parameter)
    if isinstance(parameter.module, VocabParallelEmbedding):
        rows = torch.arange(parameter.parameter.shape[1]).numpy()
        return [Part(table.hf_names(parameter)[0], rows, rows, len(rows))]
    if kind == "column":
        return table.parts(parameter)
    if kind == "special":
        part = table.expert_part(parameter) if parameter.is_expert else None
        if part is None:
            raise ConfigError(
                f"lora cannot be put on {parameter.mapping.hf_param}: its mapping "
                f"({type(parameter.mapping).__name__}) is more than a split of rows, or is split "
                f"over expert TP (etp={table.groups.mesh.etp})",
                hint="leave it out with exclude_modules, or use etp=1",
            )
        return [part]
    rows = torch.arange(parameter.parameter.shape[0]).numpy()
    return [Part(table.hf_names(parameter)[0], rows, rows, len(rows))]


def _kind(parameter: LocalParameter) -> str:
    """Return how the linear is split; an expert whose mapping is special is not split at all."""
    kind = parallel_kind(parameter)
    return "column" if kind == "special" else kind


def _shape(table: ParameterTable, parameter: LocalParameter) -> LinearShape:
    out_features, in_features = parameter.parameter.shape
    groups, kind = table.groups, _kind(parameter)
    group = groups.expert_tp if parameter.is_expert else groups.tp
    total = in_features * group.size() if kind == "row" else in_features
    if isinstance(parameter.module, VocabParallelEmbedding):
        kind, in_features, out_features = "embedding", out_features, in_features
        total = table.hf_shape(table.hf_names(parameter)[0])[0]
    return LinearShape(
        kind=kind,
        is_expert=parameter.is_expert,
        in_features=in_features,
        out_features=out_features,
        tp_group=group,
        sequence_parallel=not parameter.is_expert and groups.mesh.tp > 1,
        total_in_features=total,
    )


def _check_experts(modules: Sequence[Sequence[str]], spec: LoraSpec) -> None:
    """Raise ConfigError unless all experts of a layer are adapted alike."""
    kinds: dict[str, set[tuple[int, float]]] = {}
    for name in (module for of_expert in modules for module in of_expert):
        kinds.setdefault(name.rpartition(".")[2], set()).add(
            (spec.rank_of(name), spec.scale_of(name))
        )
    if len({len(of_expert) for of_expert in modules}) > 1 or any(
        len(k) > 1 for k in kinds.values()
    ):
        raise ConfigError(
            "the experts of one layer must have the same lora targets, rank and alpha: "
            f"{modules[0][0] if modules[0] else modules[1][0]} and its siblings differ"
        )
    if ("gate_proj" in kinds) != ("up_proj" in kinds):
        raise ConfigError(
            f"experts' gate_proj and up_proj must be targeted together: got {sorted(kinds)}",
            hint="Transformers holds them as one tensor, and PEFT refuses one without the other",
        )


def _attach(first: LocalParameter, linear: LoraLinear, name: str, active: ActiveAdapters) -> None:
    module: Any = first.module
    if not hasattr(module, "lora"):
        module.lora = torch.nn.ModuleDict()
        if hasattr(module, "return_layernorm_output"):
            module.return_layernorm_output = True
        _add_hook(module, linear, active)
    module.lora[name] = linear


def _add_hook(module: Any, linear: LoraLinear, active: ActiveAdapters) -> None:
    def lora() -> Any:
        if active.mixture is not None:
            return mixed(module.lora, active.mixture, active.expert_ids_T)
        name = active.name
        return module.lora[name] if name is not None and name in module.lora else None

    if isinstance(module, Router):
        gating = module.gating
        module.gating = lambda x: gating(x) if lora() is None else lora()(x, gating(x))
        return
    hook: Callable[..., Any] = _linear_hook
    if isinstance(linear, GroupedLoraLinear):
        hook = _expert_hook
    elif isinstance(linear, EmbeddingLora):
        hook = _embedding_hook
    module.register_forward_hook(lambda _, args, output: hook(lora(), args, output))


def _embedding_hook(
    lora: EmbeddingLora | MixedLora | None, args: tuple[Any, ...], output: Tensor
) -> Tensor:
    if isinstance(lora, MixedLora):
        return lora.add_to_embedding(args[0], output)
    return output if lora is None else output + lora.forward_tokens(args[0])


def _linear_hook(lora: LoraLinear | MixedLora | None, args: tuple[Any, ...], output: Any) -> Any:
    out, bias = output
    x: Tensor = args[0]
    if isinstance(out, tuple):
        out, x = out
    return (out if lora is None else lora(x, out)), bias


def _expert_hook(
    lora: GroupedLoraLinear | MixedLora | None, args: tuple[Any, ...], output: Any
) -> Any:
    out, bias = output
    x, counts = args
    if isinstance(lora, MixedLora):
        return lora.add_to_experts(x, out, counts), bias
    return (out if lora is None else out + lora.forward_experts(x, counts)), bias
