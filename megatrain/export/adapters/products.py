"""Whether a file computes what factors elsewhere compute: scale * B A of each linear.

Products are compared by the factors' Gram matrices in float64, never formed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatrain.config.lora import LoraSpec
from megatrain.errors import ExportError
from megatrain.export.adapters.low_rank import product_norm
from megatrain.export.adapters.peft_file import PeftFile


def largest_difference(file: PeftFile, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> float:
    """Return the largest relative Frobenius difference of a linear, and none may be missing.

    `tensors` are factors by the checkpoint's names, with experts one by one or stacked as in the
    file.  Raises ExportError, naming linears, if the two do not adapt the same ones.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in file.layers:
        owner, _, leaf = layer.name.rpartition(".")
        for expert, (a, b) in enumerate(layer.pairs(file.tensors)):
            name = f"{owner}.{expert}.{leaf}" if layer.kind == "stacked" else layer.path
            found[name] = a, b.double() * file.scale(layer)
    wanted = {name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")}
    if wrong := sorted(found.keys() ^ wanted):
        raise ExportError(f"not the same linears are adapted: {', '.join(wrong[:5])}")
    largest = 0.0
    for name, (a, b) in found.items():
        c = tensors[f"{name}.lora_A"].double()
        d = tensors[f"{name}.lora_B"].double() * spec.scale_of(name)
        norm = product_norm(c, d)
        difference = product_norm(torch.cat([a.double(), c]), torch.cat([b, -d], 1))
        largest = max(largest, difference / norm if norm else difference)
    return largest
