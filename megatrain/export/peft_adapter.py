"""A PEFT adapter on disk: written, reloaded and compared, then put in place in one step; and read.

layout.py says how factors are named and shaped; attach.py asks PEFT what it makes of them.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from megatrain.config.lora import LoraSpec, without_expert
from megatrain.errors import ExportError
from megatrain.export.attach import attach
from megatrain.export.folder import replaced
from megatrain.export.layout import PREFIX, Layer, patterns, plan, to_peft, unstack
from megatrain.export.skeleton import Skeleton
from megatrain.export.state.folder import is_state_folder
from megatrain.model.score import SCORE

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLE = "adapter_model.bin"
"""What old PEFT wrote; never read."""
_SCORE_OPTIONS = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
_KEY = re.compile(
    re.escape(PREFIX) + r"(?P<path>.+)\.lora_((?P<factor>[AB])\.weight|embedding_(?P<row>[AB]))"
)


@dataclass(frozen=True)
class AdapterFiles:
    """What will be in an adapter's files: checked against PEFT, not yet written."""

    config: dict[str, Any]
    weights: dict[str, Tensor]


def write_adapter(
    directory: Path,
    *,
    spec: LoraSpec,
    tensors: Mapping[str, Tensor],
    base_model: str,
    hf_config: PretrainedConfig | dict[str, Any],
) -> Path:
    """Write canonical factors `<module>.lora_A` and `.lora_B` so that PEFT loads them exactly.

    The config names exactly the modules that have weights.  An existing adapter is replaced in one
    step, and stays if anything fails.

    Raises:
        ExportError: the factors do not fit the model, spec or PEFT; the file differs from them; or
            `directory` holds something else than an adapter.
    """
    files = prepare_adapter(spec, tensors, base_model=base_model, hf_config=hf_config)
    return write_files(directory, files)


def prepare_adapter(
    spec: LoraSpec,
    tensors: Mapping[str, Tensor],
    *,
    base_model: str,
    hf_config: PretrainedConfig | dict[str, Any],
) -> AdapterFiles:
    """Return what write_adapter writes, after PEFT has been asked.  Raises ExportError.

    With a score head, the adapter is one of Transformers' model for sequence classification.
    """
    _check_finite(tensors)
    score = tensors.get(SCORE)
    tensors = {name: tensor for name, tensor in tensors.items() if name != SCORE}
    skeleton = Skeleton(hf_config, has_score=score is not None)
    layers = plan(skeleton, spec, tensors)
    config = spec.to_peft_dict(
        target_modules=[layer.name for layer in layers if not layer.is_parameter],
        target_parameters=[layer.name for layer in layers if layer.is_parameter],
    )
    config["rank_pattern"], config["alpha_pattern"] = patterns(spec, layers)
    config["base_model_name_or_path"] = base_model
    weights: dict[str, Tensor] = {}
    for layer in layers:
        weights |= to_peft(layer, tensors)
    if score is not None:
        config |= _SCORE_OPTIONS
        weights[PREFIX + SCORE] = score
    _check_scales(attach(skeleton.model, config, weights), spec, layers)
    return AdapterFiles(config, _separate(weights))


def write_files(
    directory: Path,
    files: AdapterFiles,
    also: Callable[[Path], None] | None = None,
    *,
    may_replace: Callable[[Path], bool] | None = None,
) -> Path:
    """Write an adapter's files, and what `also` writes beside them, in one step.

    `also` may check them, too: if it raises, nothing is written.
    `may_replace` tells which existing folder is replaced: is_adapter, unless it is given.
    """
    with replaced(directory, may_replace=may_replace or is_adapter) as new:
        save_file(files.weights, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(files.config, indent=2) + "\n")
        _check_written(new, files.config, files.weights)
        if also is not None:
            also(new)
    return Path(directory)


def read_adapter(
    directory: Path, *, hf_config: PretrainedConfig | dict[str, Any]
) -> tuple[LoraSpec, dict[str, Tensor]]:
    """Return an adapter's options, with exact targets, and its canonical factors.

    An expert of a stacked parameter is `...experts.<e>.<parameter>`; PEFT's fused factor of gate
    and up is not taken apart.

    Raises:
        ExportError: a key is missing, renamed, reshaped or too many, or a scale is not what the
            config says.
        ConfigError: the config asks for what megatrain does not support.
    """
    directory = Path(directory)
    config, weights = load_config(directory), load_weights(directory)
    has_score = PREFIX + SCORE in weights
    plain = {**config, "modules_to_save": None} if has_score else config
    spec = LoraSpec.from_any(plain)
    skeleton = Skeleton(hf_config, has_score=has_score)
    scales = attach(skeleton.model, config, weights)
    score = weights.pop(PREFIX + SCORE, None)
    tensors = _canonical(skeleton, spec, weights)
    exact = _exact_targets(spec, plan(skeleton, spec, tensors))
    _check_scales(scales, exact, plan(skeleton, exact, tensors))
    return exact, tensors if score is None else {**tensors, SCORE: score}


def is_adapter(directory: Path) -> bool:
    """Return whether a folder holds an adapter, its training state, and nothing else."""
    names = {path.name for path in directory.iterdir() if not is_state_folder(path)}
    return names <= {WEIGHTS, CONFIG, "README.md"} and (CONFIG in names or not names)


def is_adapter_without_state(directory: Path) -> bool:
    """Return whether a folder holds an adapter and no training state that would go with it."""
    return is_adapter(directory) and not any(map(is_state_folder, directory.iterdir()))


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise ExportError(f"{len(wrong)} tensor(s) are not finite: {', '.join(wrong[:5])}")


def _separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU that share no memory, as safetensors wants them."""
    return {
        key: torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(
            tensor.detach()
        )
        for key, tensor in weights.items()
    }


def _check_scales(scales: Mapping[str, float], spec: LoraSpec, layers: list[Layer]) -> None:
    for layer in layers:
        wanted = spec.scale_of(layer.modules[min(layer.modules)])
        if not math.isclose(scales[layer.key], wanted, rel_tol=1e-12):
            raise ExportError(
                f"PEFT would scale {layer.name} by {scales[layer.key]}, not by {wanted}",
                hint="check r, lora_alpha, use_rslora, rank_pattern and alpha_pattern",
            )


def _check_written(
    directory: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    if json.loads((directory / CONFIG).read_text()) != config:
        raise ExportError(f"{CONFIG} does not hold what was written: {directory}")
    found = load_file(directory / WEIGHTS)
    if found.keys() != weights.keys():
        wrong = sorted(found.keys() ^ weights.keys())
        raise ExportError(f"{WEIGHTS} has other keys than were written: {wrong[:5]}")
    for key, tensor in weights.items():
        if not same_bytes(found[key], tensor):
            raise ExportError(f"{WEIGHTS} does not hold what was written: {key}")


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors have the same dtype, shape and bits."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(
            one.contiguous().reshape(-1).view(torch.uint8),
            other.contiguous().reshape(-1).view(torch.uint8),
        )
    )


def load_config(directory: Path) -> dict[str, Any]:
    """Return adapter_config.json of a PEFT directory.  Raises ExportError."""
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot read {path}: {error}", hint="is this a PEFT adapter?") from error
    if not isinstance(config, dict):
        raise ExportError(f"not an object: {path}", hint="is this a PEFT adapter?")
    return config


def load_weights(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a PEFT directory by PEFT's keys.  Raises ExportError."""
    path = directory / WEIGHTS
    if not path.exists() and (directory / PICKLE).exists():
        raise ExportError(
            f"pickled weights are not read: {directory / PICKLE}",
            hint="load it in PEFT where you trust it, and save it with safe_serialization=True",
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot read {path}: {error}", hint="is this a PEFT adapter?") from error


def _canonical(
    skeleton: Skeleton, spec: LoraSpec, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise ExportError(f"not a key of a PEFT LoRA adapter: {key}", hint=f"{PREFIX}<module>…")
        pairs.setdefault(found["path"], {})[found["factor"] or found["row"]] = tensor
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ExportError(f"lora_A or lora_B is missing: {path}")
        for module, a, b in _modules_of(skeleton, spec, path, pair["A"], pair["B"]):
            tensors |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
    return tensors


def _modules_of(
    skeleton: Skeleton, spec: LoraSpec, path: str, a: Tensor, b: Tensor
) -> list[tuple[str, Tensor, Tensor]]:
    owner = re.sub(r"(\.base_layer)+$", "", path)
    if skeleton.module(owner) is None:
        return [(path, a, b)]
    shapes = skeleton.parameters_of(owner)
    targeted = [each for each in shapes if spec.targets_parameter(f"{owner}.{each}")]
    depth = path.removeprefix(owner).count(".base_layer")
    if not targeted or len(shapes[targeted[-1]]) != 3:
        return [(owner, a, b)]
    parameter = targeted[len(targeted) - 1 - depth]
    experts = unstack(a, b, num_experts=shapes[parameter][0])
    return [(f"{owner}.{e}.{parameter}", *pair) for e, pair in enumerate(experts)]


def _exact_targets(spec: LoraSpec, layers: list[Layer]) -> LoraSpec:
    """Return the spec with the names of exactly these layers, as canonical names match them."""
    parameters, modules = set(), set()
    for layer in layers:
        if layer.is_parameter and (layer.stacked or layer.place.kind == "parameter"):
            parameters.add(layer.name)
        else:
            modules |= {without_expert(module) for module in layer.modules.values()}
    options = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    return LoraSpec(
        **options
        | {
            "target_modules": tuple(sorted(modules)),
            "target_parameters": tuple(sorted(parameters)) or None,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    )
