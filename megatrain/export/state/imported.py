"""Whether an adapter that came from a PEFT file fits the base model that is here: by shapes alone.

Such a state does not know its base.  What PEFT put into the file of the base itself is compared.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megatrain.checkpoint.safetensors_file import raw_bytes
from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.config.lora import without_expert
from megatrain.errors import CheckpointError
from megatrain.export.state.record import CarriedRecord, ImportedRecord

_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def check_imported(
    imported: ImportedRecord, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """Raise CheckpointError, naming modules, unless all of them are in the base, of these shapes.

    `shapes` are those of the base's tensors, `folder` is its checkpoint.
    """
    here: dict[str, set[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module = without_expert(name.removesuffix(".weight"))
        here.setdefault(module, set()).add(tuple(shape[-2:]))
    wrong = [
        f"{module} (in, out) = {shape}, the base has {sorted(here.get(module, ()))}"
        for module, shape in imported.shapes.items()
        if not any(shape in (found, found[::-1]) for found in here.get(module, ()))
    ]
    experts = _num_experts(shapes)
    wrong += [
        f"{stack.owner} of {stack.num_experts} experts, the base has {experts[stack.owner]}"
        for stack in imported.stacked.values()
        if stack.num_experts != experts.get(stack.owner, stack.num_experts)
    ]
    if wrong:
        raise CheckpointError(
            f"the adapter does not fit {folder}: {len(wrong)} module(s) are missing or have "
            f"another shape: {'; '.join(wrong[:3])}",
            hint=f"it was made for {imported.config.get('base_model_name_or_path')!r}",
        )
    _check_carried(imported.carried, folder)


def _num_experts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    result: dict[str, int] = {}
    for name, shape in shapes.items():
        if found := re.match(r"(.+\.experts)\.(\d+)\.", name):
            result[found[1]] = max(result.get(found[1], 0), int(found[2]) + 1)
        elif (stacked := re.match(r"(.+\.experts)\.[^.]+$", name)) and len(shape) == 3:
            result[stacked[1]] = shape[0]
    return result


def _check_carried(carried: Mapping[str, CarriedRecord], folder: Path) -> None:
    """Refuse another embedding than the base's: training would go on from the wrong one."""
    if not carried:
        return
    base = SafetensorsFolder(folder)
    for key, record in carried.items():
        name = key.removesuffix(".base_layer.weight") + ".weight"
        name = name if name in base else _TIED.get(name, name)
        if digest(base[name].to(getattr(torch, record.dtype))) != record.xxh3:
            raise CheckpointError(
                f"the adapter's file holds another {name} than {folder}",
                hint="the model was resized or trained there: train from that model, merged",
            )


def digest(tensor: Tensor) -> str:
    """Return the XXH3-64 of a tensor's bytes."""
    return xxhash.xxh3_64(raw_bytes(tensor)).hexdigest()
