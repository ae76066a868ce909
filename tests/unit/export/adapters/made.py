"""Adapters that PEFT makes on tiny checkpoints, and what PEFT computes with them."""

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

DENSE: dict[str, Any] = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "rank_pattern": {"k_proj": 2, "layers.1.mlp.gate_proj": 8},
    "alpha_pattern": {"v_proj": 2, "up_proj": 6},
    "use_rslora": True,
}
HEADS: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
FUSED: dict[str, Any] = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
STACKED: dict[str, Any] = {
    "target_modules": ["o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "rank_pattern": {"layers.1.mlp.experts.down_proj": 2},
    "alpha_pattern": {"layers.2.mlp.experts.gate_up_proj": 3},
    "use_rslora": True,
}
ROUTER: dict[str, Any] = {
    "target_modules": [],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3", DENSE),
    "embedding and head": ("qwen3", HEADS),
    "fused experts": ("qwen3_moe", FUSED),
    "stacked experts": ("qwen3_moe", STACKED),
    "experts and router": ("qwen3_moe", ROUTER),
    "gpt-oss": ("gpt_oss", STACKED),
    "latent attention": ("deepseek_v3", {"target_modules": ["q_a_proj", "kv_b_proj", "o_proj"]}),
    "latent attention, experts": ("deepseek_v3", STACKED),
}
"""Family and LoraConfig's options."""
IDS = torch.arange(1, 25)[None] * 7 % 500


def base_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a checkpoint as Transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def quiet(function: Any) -> Any:
    """Let PEFT's warnings pass."""

    @functools.wraps(function)
    def silent(*args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **options)

    return silent


@quiet
def peft_adapter(
    folder: Path,
    path: Path,
    options: dict[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """Save an adapter that PEFT made at random, and return PEFT's model."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | options)
    model = get_peft_model(base_model(folder, dtype), config, autocast_adapter_dtype=False)
    model.save_pretrained(path)
    return model.eval()


@quiet
def load_peft(folder: Path, adapter: Path) -> PeftModel:
    """Return the checkpoint with an adapter; what PEFT leaves out is an error."""
    model = PeftModel.from_pretrained(base_model(folder), adapter)
    result = model.load_adapter(adapter, "default")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return model.eval()


@quiet
def merged_by_peft(model: PeftModel, path: Path) -> dict[str, Tensor]:
    """Return the tensors of PEFT's own merge."""
    model.merge_and_unload().save_pretrained(path)
    return tensors_in(path)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder."""
    result: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        result |= load_file(path)
    return result


def logits(model: nn.Module) -> Tensor:
    """Return the model's output for a fixed text."""
    with torch.inference_mode():
        return model(IDS).logits


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Tell whether two files hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(
        value.dtype == other[key].dtype
        and torch.equal(value.view(torch.uint8), other[key].view(torch.uint8))
        for key, value in one.items()
    )


def ulps(one: Tensor, other: Tensor) -> int:
    """Return the largest distance of two tensors in units in the last place of their dtype."""
    kind, sign = (torch.int32, 1 << 31) if one.dtype == torch.float32 else (torch.int16, 1 << 15)
    places = []
    for each in (one, other):
        bits = each.contiguous().view(kind).long()
        places.append(torch.where(bits < 0, -(bits + sign), bits))
    return int((places[0] - places[1]).abs().max())
