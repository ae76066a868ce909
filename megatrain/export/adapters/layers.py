"""The pairs of factors in a PEFT file, and their numbers: from keys, shapes and config alone.

PEFT's file does not say which parameter a stacked pair adapts, nor of how many experts it is: that
follows from target_parameters, from the depth of `.base_layer` in the key, and from the rank.
layout.py describes these layouts.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatrain.config.lora import LoraSpec
from megatrain.errors import ExportError
from megatrain.export.layout import PREFIX, unstack

NESTED = ("gate_up_proj", "down_proj")
"""Parameters of experts, in the order in which PEFT nests them."""
_KEY = re.compile(
    re.escape(PREFIX)
    + r"(?P<path>.+)\.lora_((?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))"
)
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_FUSED |= {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class Layer:
    """One pair of factors in a PEFT file."""

    path: str
    """In the key, between PEFT's prefix and `.lora_A`."""
    name: str
    """By which PEFT's patterns know it; for stacked experts their parameter."""
    kind: Literal["linear", "embedding", "stacked"]
    rank: int
    """Of one expert."""
    alpha: float
    num_experts: int = 1

    @property
    def keys(self) -> tuple[str, str]:
        """Return the keys of A and B in the file."""
        if self.kind == "embedding":
            return f"{PREFIX}{self.path}.lora_embedding_A", f"{PREFIX}{self.path}.lora_embedding_B"
        return f"{PREFIX}{self.path}.lora_A.weight", f"{PREFIX}{self.path}.lora_B.weight"

    def pairs(self, tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return (A, B) of each expert, or the only one."""
        a, b = (tensors[key] for key in self.keys)
        if self.kind == "stacked":
            return unstack(a, b, num_experts=self.num_experts)
        return [(a, b)]


def is_factor(key: str) -> bool:
    """Tell whether a key is of a LoRA factor."""
    return _KEY.fullmatch(key) is not None


def find_layers(spec: LoraSpec, tensors: Mapping[str, Tensor]) -> list[Layer]:
    """Return the layers of a file that holds these factors.

    Raises ExportError for a factor without its other one, or of another rank than the config says.
    """
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    embeddings: set[str] = set()
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        assert found is not None
        pairs[found["path"]][found["linear"] or found["embedding"]] = tensor
        if found["embedding"]:
            embeddings.add(found["path"])
    parameters = dict(_stacked_parameters(spec, pairs))
    layers = []
    for path, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ExportError(f"lora_A or lora_B is missing: {path}")
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ExportError(
                f"{path}: lora_A must be (r, in) and lora_B (out, r): lora_A {tuple(a.shape)}, "
                f"lora_B {tuple(b.shape)}"
            )
        if path in parameters:
            layers.append(_stack(spec, path, parameters[path], a))
        else:
            kind: Literal["embedding", "linear"] = "embedding" if path in embeddings else "linear"
            layers.append(_single(spec, path, kind, a.shape[0]))
    _check_fused(spec, layers)
    return layers


def _stacked_parameters(spec: LoraSpec, paths: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield paths of stacked layers, and which parameter each adapts."""
    owners: dict[str, dict[int, str]] = defaultdict(dict)
    for path in paths:
        owner = re.sub(r"(\.base_layer)+$", "", path)
        owners[owner][path.removeprefix(owner).count(".base_layer")] = path
    for owner, by_depth in owners.items():
        leaves = {each.rpartition(".")[2] for each in spec.target_parameters or ()} - {"weight"}
        leaves = {leaf for leaf in leaves if spec.targets_parameter(f"{owner}.{leaf}")}
        if not leaves or not _is_owner(owner, by_depth):
            continue
        if len(leaves) > 1 and not leaves <= {*NESTED}:
            raise ExportError(
                f"cannot tell in which order PEFT nests {sorted(leaves)} of {owner}",
                hint=f"known: {', '.join(NESTED)}",
            )
        order = [leaf for leaf in NESTED if leaf in leaves] if len(leaves) > 1 else [*leaves]
        if sorted(by_depth) != list(range(len(order))):
            raise ExportError(
                f"the config targets {order} of {owner}, but the file has {len(by_depth)} pair(s) "
                f"of factors there: {sorted(by_depth.values())}"
            )
        for depth, path in by_depth.items():
            yield path, f"{owner}.{order[len(order) - 1 - depth]}"


def _is_owner(owner: str, by_depth: Mapping[int, str]) -> bool:
    """Tell experts from a linear that happens to be called like a target: gate_up_proj."""
    return owner.rpartition(".")[2] == "experts" or len(by_depth) > 1


def _stack(spec: LoraSpec, path: str, parameter: str, a: Tensor) -> Layer:
    rank = spec.rank_of(parameter)
    if a.shape[0] % rank:
        raise ExportError(
            f"{path}: lora_A must have r rows for each expert: r={rank}, {a.shape[0]} rows"
        )
    alpha = spec.alpha_of(parameter)
    return Layer(path, parameter, "stacked", rank, alpha, a.shape[0] // rank)


def _single(spec: LoraSpec, path: str, kind: Literal["embedding", "linear"], rank: int) -> Layer:
    if parameter := _fused_parameter(spec, path):
        fused = spec.rank_of(parameter)
        ratio = rank / fused
        alpha = spec.alpha_of(parameter) * (math.sqrt(ratio) if spec.use_rslora else ratio)
        whole = int(alpha) if float(alpha).is_integer() else alpha
        return Layer(path, parameter, kind, rank, whole)
    if rank != spec.rank_of(path):
        raise ExportError(
            f"{path}: the config says r={spec.rank_of(path)}, lora_A has {rank} rows",
            hint="adapter_config.json does not belong to this file, or rank_pattern is missing",
        )
    return Layer(path, spec.pattern_name(path), kind, rank, spec.alpha_of(path))


def _fused_parameter(spec: LoraSpec, path: str) -> str | None:
    """Return the stacked parameter whose numbers an expert of a 2-D file has, if it has them.

    That is so where the config's patterns name the parameter that PEFT fuses the experts into.
    """
    found = re.fullmatch(r"(.+\.experts)\.\d+\.([^.]+)", path)
    if found is None or found[2] not in _FUSED:
        return None
    owners = (found[1], found[1].replace(".block_sparse_moe.", ".mlp."))
    names = [f"{owner}.{_FUSED[found[2]]}" for owner in owners]
    return next((name for name in names if spec.targets_parameter(name)), None)


def _check_fused(spec: LoraSpec, layers: list[Layer]) -> None:
    ranks: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for layer in layers:
        found = re.fullmatch(r".+\.experts\.(\d+)\.([^.]+)", layer.path)
        if found is not None and layer.name != layer.path:
            ranks[layer.name, found[1]][found[2]] = layer.rank
    for (name, expert), parts in ranks.items():
        if sum(parts.values()) != spec.rank_of(name):
            raise ExportError(
                f"{name}: the config says r={spec.rank_of(name)} for all parts of expert {expert} "
                f"together, the file has {parts}"
            )
