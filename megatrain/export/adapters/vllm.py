"""An adapter as vLLM takes it: one rank, one scale, experts one by one.

vLLM reads no rank_pattern and no alpha_pattern: an adapter that needs them would be scaled wrongly
without a word.  So every scale goes into B, in float32, cast once, and alpha / r is 1.  Factors of
a smaller rank are filled with zeros, which changes no product.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.config.lora import LoraSpec, without_expert
from megatrain.errors import ExportError
from megatrain.export.adapters.low_rank import pad
from megatrain.export.layout import PREFIX
from megatrain.export.peft_adapter import AdapterFiles
from megatrain.model.score import SCORE

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""
PACKED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
    "in_proj_b": "in_proj_ba",
    "in_proj_a": "in_proj_ba",
}
"""What vLLM calls a linear that it runs together with others, in most families."""
REFUSED = {
    "kv_b_proj": "vLLM multiplies it into other weights when it loads the model",
    "score": "vLLM takes no modules_to_save",
    "gate": "vLLM's router has no LoRA",
    "router": "vLLM's router has no LoRA",
    "shared_expert_gate": "vLLM's router has no LoRA",
}
"""Modules that vLLM has no adapter for, by the last part of their name."""
STACKED = ("gate_up_proj", "down_proj")
WHOLE_EXPERTS = ({*STACKED}, {"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"})
_EXPERT = re.compile(r"(?P<owner>.+\.experts)\.(?P<expert>\d+)\.(?P<leaf>[^.]+)")


@dataclass(frozen=True)
class VllmAdapter:
    """The files, and how vLLM must be started for them."""

    files: AdapterFiles
    max_lora_rank: int
    target_modules: tuple[str, ...]
    """In vLLM's names, for --lora-target-modules."""
    experts: str
    """none, per expert, or stacked."""


def for_vllm(
    spec: LoraSpec, tensors: Mapping[str, Tensor], *, base_model: str, embeddings: Collection[str]
) -> VllmAdapter:
    """Return the files of an adapter whose factors have canonical names.

    Raises ExportError, naming modules, for what vLLM cannot hold.
    """
    modules = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    _check(tensors, modules)
    rank = max(tensors[f"{each}.lora_A"].shape[0] for each in modules)
    pairs = {each: _folded(spec, tensors, each, rank) for each in modules}
    stacked = [each for each in modules if _is_stacked(each, pairs)]
    weights = _stack({each: pairs.pop(each) for each in stacked})
    for module, (a, b) in pairs.items():
        pattern = "embedding_{}" if module in embeddings else "{}.weight"
        weights[f"{PREFIX}{module}.lora_{pattern.format('A')}"] = a
        weights[f"{PREFIX}{module}.lora_{pattern.format('B')}"] = b
    leaves = {each.rpartition(".")[2] for each in pairs}
    parameters = {without_expert(each) for each in stacked}
    config = spec.to_peft_dict(target_modules=leaves, target_parameters=parameters) | {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "base_model_name_or_path": base_model,
    }
    return VllmAdapter(
        AdapterFiles(config, weights),
        _max_rank(rank),
        _targets(pairs, bool(stacked)),
        "stacked" if stacked else "per expert" if any(map(_EXPERT.fullmatch, pairs)) else "none",
    )


def _is_stacked(module: str, modules: Collection[str]) -> bool:
    """Tell whether an expert's factors are of a parameter of all experts: only then is it whole."""
    found = _EXPERT.fullmatch(module)
    if found is None or found["leaf"] not in STACKED:
        return False
    expert = f"{found['owner']}.{found['expert']}"
    return found["leaf"] == "gate_up_proj" or f"{expert}.gate_up_proj" in modules


def _check(tensors: Mapping[str, Tensor], modules: list[str]) -> None:
    wrong = {
        name: REFUSED[leaf] for name in modules if (leaf := name.rpartition(".")[2]) in REFUSED
    }
    if SCORE in tensors:
        wrong[SCORE] = REFUSED["score"]
    wrong |= dict.fromkeys(_lonely_experts(modules), "vLLM's experts take all of their linears")
    if wrong:
        name, why = next(iter(wrong.items()))
        raise ExportError(
            f"vLLM cannot hold {len(wrong)} module(s) of this adapter: {', '.join([*wrong][:5])}: "
            f"{why} ({name})",
            hint="megatrain convert adapter merge puts it into the base instead",
        )


def _lonely_experts(modules: list[str]) -> list[str]:
    """Return experts whose other linears are not adapted."""
    leaves: dict[str, set[str]] = {}
    for module in modules:
        if found := _EXPERT.fullmatch(module):
            leaves.setdefault(f"{found['owner']}.{found['expert']}", set()).add(found["leaf"])
    return [expert for expert, found in leaves.items() if found not in WHOLE_EXPERTS]


def _folded(
    spec: LoraSpec, tensors: Mapping[str, Tensor], module: str, rank: int
) -> tuple[Tensor, Tensor]:
    a, b = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
    scaled = (b.float() * spec.scale_of(module)).to(b.dtype)
    a, b = pad(a, scaled, rank)
    return a.contiguous(), b.contiguous()


def _stack(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return PEFT's stacked layout, for families whose checkpoint is stacked too."""
    owners: dict[str, dict[str, dict[int, tuple[Tensor, Tensor]]]] = {}
    for module, pair in pairs.items():
        found = _EXPERT.fullmatch(module)
        assert found is not None
        leaves = owners.setdefault(found["owner"], {})
        leaves.setdefault(found["leaf"], {})[int(found["expert"])] = pair
    weights: dict[str, Tensor] = {}
    for owner, leaves in owners.items():
        for leaf, path in zip(STACKED, (f"{owner}.base_layer", owner), strict=True):
            experts = [leaves[leaf][e] for e in sorted(leaves[leaf])]
            weights[f"{PREFIX}{path}.lora_A.weight"] = torch.cat([a for a, _ in experts])
            b = torch.stack([b for _, b in experts], dim=-1).flatten(1)
            weights[f"{PREFIX}{path}.lora_B.weight"] = b
    return weights


def _max_rank(rank: int) -> int:
    if rank > MAX_RANKS[-1]:
        raise ExportError(
            f"vLLM takes ranks up to {MAX_RANKS[-1]}: this adapter has {rank}",
            hint="megatrain convert adapter resize makes it smaller",
        )
    return next(each for each in MAX_RANKS if each >= rank)


def _targets(pairs: Mapping[str, object], stacked: bool) -> tuple[str, ...]:
    """Return names for --lora-target-modules: vLLM leaves out the rest without a word.

    Linears that some families pack, and others (Nemotron, DeepSeek-V2-Lite) do not, under both.
    """
    leaves = {each.rpartition(".")[2] for each in pairs if not _EXPERT.fullmatch(each)}
    names = leaves | {PACKED[each] for each in leaves if each in PACKED}
    has_experts = stacked or any(map(_EXPERT.fullmatch, pairs))
    return tuple(sorted(names | ({"experts"} if has_experts else set())))
