"""A PEFT directory, read by itself: no base model, no configuration of one.

What PEFT saves beside factors is kept apart: a score head, and embeddings of the base.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatrain.config.lora import LoraSpec
from megatrain.errors import ConfigError, ExportError
from megatrain.export.adapters.experts import model_types_of
from megatrain.export.adapters.layers import Layer, find_layers, is_factor
from megatrain.export.layout import PREFIX
from megatrain.export.peft_adapter import CONFIG, AdapterFiles, load_config, load_weights
from megatrain.model.score import SCORE

BASE_WEIGHT = ".base_layer.weight"


@dataclass(frozen=True)
class PeftFile:
    """An adapter as PEFT wrote it."""

    config: Mapping[str, Any]
    spec: LoraSpec
    """The config's LoRA options."""
    layers: tuple[Layer, ...]
    tensors: Mapping[str, Tensor]
    """Factors, by PEFT's keys."""
    carried: Mapping[str, Tensor]
    """Weights of the base, by PEFT's keys without its prefix."""
    score: Tensor | None

    @property
    def files(self) -> AdapterFiles:
        """Return the files that this was read from."""
        weights = {**self.tensors, **{PREFIX + key: each for key, each in self.carried.items()}}
        if self.score is not None:
            weights[PREFIX + SCORE] = self.score
        return AdapterFiles(dict(self.config), weights)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self.files.weights.values())

    def scale(self, layer: Layer) -> float:
        """Return the factor of B A in a layer."""
        return self.spec.scale(rank=layer.rank, alpha=layer.alpha)


def read_peft(folder: Path) -> PeftFile:
    """Read a PEFT directory.

    Raises:
        ExportError: a file is missing or damaged, or holds what is no LoRA of linears, experts and
            embeddings.
        ConfigError: the config asks for what megatrain does not support, DoRA for instance.
    """
    return _parsed(load_config(folder), load_weights(folder), str(folder))


def as_file(files: AdapterFiles) -> PeftFile:
    """Return what would be read if these files were written."""
    return _parsed(files.config, dict(files.weights), "the adapter")


def _parsed(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> PeftFile:
    score = weights.pop(PREFIX + SCORE, None)
    plain = config if score is None else {**config, "modules_to_save": None}
    spec = LoraSpec.from_any(plain)
    carried = {
        key.removeprefix(PREFIX): weights.pop(key)
        for key in [*weights]
        if key.startswith(PREFIX) and key.endswith(BASE_WEIGHT)
    }
    if wrong := [key for key in weights if not is_factor(key)]:
        raise ExportError(
            f"{len(wrong)} tensor(s) in {where} are no LoRA factors: {', '.join(wrong[:5])}",
            hint=f"factors are called {PREFIX}<module>.lora_A.weight",
        )
    if not weights:
        raise ExportError(f"an adapter needs at least one module: {where} has none")
    return PeftFile(config, spec, tuple(find_layers(spec, weights)), weights, carried, score)


def base_model_type(config: Mapping[str, Any], given: str | None) -> str | None:
    """Return the base's model_type: as given, else what the adapter's config tells of it.

    Raises ConfigError if the two are of different families.
    """
    known = _model_types(config)
    if given is not None and known and given not in known:
        raise ConfigError(
            f"--model-type must be that of the adapter's base: --model-type={given}, "
            f"{CONFIG} tells {' or '.join(known)}",
            hint="leave it out: it is for adapters whose config does not tell",
        )
    return given or next(iter(known), None)


def _model_types(config: Mapping[str, Any]) -> list[str]:
    """Return what the base may be called: by its class, or by the folder that is named."""
    auto = config.get("auto_mapping") or {}
    if known := model_types_of(str(auto.get("base_model_class"))):
        return known
    path = Path(str(config.get("base_model_name_or_path"))) / "config.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    parts = [found.get("text_config"), found] if isinstance(found, dict) else []
    types = [part.get("model_type") for part in parts if isinstance(part, dict)]
    return [each for each in types if isinstance(each, str)]
