"""How many parameters a model has, counted from its tensors; quantised ones as what they stand for.

No torch.  A rule that is not known gives None rather than a guess.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatrain.export.compare.headers import StoredTensor

ROUTED = re.compile(r"\.experts\.")
"""In the name of a tensor of a routed expert, or of all of them."""
AIDS = (
    "_scale_inv",
    "_scales",
    "_scale",
    "_zero_point",
    "_shape",
    "_g_idx",
    ".scales",
    ".qzeros",
    ".g_idx",
    "input_scale",
    "activation_scale",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
)
"""Endings of tensors that say how to read a quantised one."""
NO_PARAMETERS = (".rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters of a model."""

    total: int
    active: int | None
    """Used for one token; None for a model with experts whose config does not say how many."""


def quantisation(config: Mapping[str, Any]) -> str | None:
    """Say how a checkpoint is quantised, in its own words; None if it is not."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(found, Mapping):
        return None
    method = str(found.get("quant_method", "unknown method"))
    details = [f"{key} {found[key]}" for key in ("format", "fmt", "bits") if found.get(key)]
    if block := found.get("weight_block_size"):
        details.append(f"blocks of {' x '.join(map(str, block))}")
    details += [
        f"{weights.get('type', '?')}{weights.get('num_bits', '?')} weights"
        for group in (found.get("config_groups") or {}).values()
        if isinstance(group, Mapping) and isinstance(weights := group.get("weights"), Mapping)
    ]
    return f"{method} ({', '.join(dict.fromkeys(details))})" if details else method


def count(tensors: Iterable[StoredTensor], config: Mapping[str, Any]) -> Count:
    """Count the parameters of a checkpoint."""
    text = config.get("text_config") or config
    is_quantised, bits = quantisation(config) is not None, _bits(config)
    total = routed = 0
    for tensor in tensors:
        if tensor.name.endswith(NO_PARAMETERS):
            continue
        size = _parameters_of(tensor, bits) if is_quantised else tensor.numel
        total += size
        routed += size if ROUTED.search(tensor.name) else 0
    if not routed:
        return Count(total, total)
    num, used = _first(text, NUM_EXPERTS), _first(text, USED_EXPERTS)
    active = None if not num or not used else total - routed + math.ceil(routed * used / num)
    return Count(total, active)


NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
USED_EXPERTS = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "experts_per_token")


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _bits(config: Mapping[str, Any]) -> int | None:
    """Return the bits of a weight that is packed into whole integers."""
    found = config.get("quantization_config") or config.get("compression_config") or {}
    widths = {
        group["weights"]["num_bits"]
        for group in (found.get("config_groups") or {}).values()
        if isinstance(group.get("weights"), Mapping) and group["weights"].get("num_bits")
    }
    if found.get("load_in_4bit") or found.get("_load_in_4bit"):
        widths.add(4)
    if isinstance(found.get("bits"), int):
        widths.add(found["bits"])
    return widths.pop() if len(widths) == 1 else None


def _parameters_of(tensor: StoredTensor, bits: int | None) -> int:
    """Return how many entries of the unquantised weight a tensor stands for."""
    name = tensor.name
    if name.endswith(AIDS) or ".quant_state." in name:
        return 0
    if name.endswith("_blocks"):  # MXFP4: two entries in a byte
        return tensor.numel * 2
    if name.endswith((".weight_packed", ".qweight")) and bits:
        return tensor.num_bytes * 8 // bits
    if tensor.dtype == "U8" and bits == 4:  # bitsandbytes
        return tensor.numel * 2
    return tensor.numel
