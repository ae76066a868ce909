"""Where a LoRA factor belongs in a Transformers model.  The model has names and shapes, no weights.

Which experts Transformers fuses, and under which name, is asked of Transformers' own conversion.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from megatrain.errors import ExportError

_EXPERT = re.compile(r"(?P<owner>.+\.experts)\.(?P<expert>\d+)\.(?P<leaf>[^.]+)$")


@dataclass(frozen=True)
class Place:
    """One canonical module's place in the model."""

    kind: Literal["linear", "embedding", "parameter", "part", "expert"]
    """part: of an expert that Transformers fuses when it loads; expert: of a 3-D parameter."""
    owner: str
    """Path of the module that holds the parameter."""
    parameter: str = "weight"
    expert: int = 0
    part: int = 0
    """Position among the parts that are fused: 0 gate, 1 up."""
    num_parts: int = 1

    @property
    def path(self) -> str:
        """Path of the parameter."""
        return f"{self.owner}.{self.parameter}"


class Skeleton:
    """A Transformers model on the meta device."""

    def __init__(
        self, hf_config: PretrainedConfig | dict[str, Any], *, has_score: bool = False
    ) -> None:
        self.model = _build(hf_config, has_score=has_score)
        entries = get_model_conversion_mapping(self.model)
        self._renamings = [each for each in entries if isinstance(each, WeightRenaming)]
        self._converters = [each for each in entries if isinstance(each, WeightConverter)]
        self._modules = dict(self.model.named_modules())
        parts = [each for each in self._converters if _merges_experts(each)]
        leaves = {p.split(".")[-2] for each in parts for p in each.source_patterns}
        self.names_taken_by_peft = leaves | {"gate"} if leaves else frozenset()
        """PEFT takes these in target_modules for the experts and router, wherever they are."""

    def module(self, path: str) -> nn.Module | None:
        """Return a module of the model, or None."""
        return self._modules.get(path)

    def parameters_of(self, owner: str) -> dict[str, torch.Size]:
        """Return names and shapes of a module's own parameters, in the order PEFT nests them."""
        module = self._modules[owner]
        return {name: each.shape for name, each in module.named_parameters(recurse=False)}

    def renamed(self, key: str) -> str:
        """Return what Transformers' model calls a tensor of the checkpoint."""
        name: str = rename_source_key(key, self._renamings, self._converters)[0]
        return name

    def place(self, module: str) -> Place:
        """Find a canonical module.

        Raises:
            ExportError: the model has no such module.
        """
        key, source = rename_source_key(f"{module}.weight", self._renamings, self._converters)
        if source is not None:
            return self._part(module, key, source)
        owner = key.removesuffix(".weight")
        if found := _EXPERT.match(owner):
            place = Place("expert", found["owner"], found["leaf"], int(found["expert"]))
            owned = self._modules.get(place.owner)
            if (
                owned is not None
                and len(self.parameters_of(place.owner).get(place.parameter, ())) == 3
            ):
                return place
        match self._modules.get(owner):
            case None:
                pass
            case nn.Embedding():
                return Place("embedding", owner)
            case nn.Linear() | Conv1D():
                name = owner.rpartition(".")[-1]
                taken = name in self.names_taken_by_peft
                return Place("parameter" if taken else "linear", owner)
            case router if len(self.parameters_of(owner).get("weight", ())) == 2:
                _check_no_buffer(router, module)
                return Place("parameter", owner)
        raise ExportError(
            f"{type(self.model).__name__} has no module that LoRA can adapt at {module}",
            hint="names are those of the Hugging Face checkpoint",
        )

    def _part(self, module: str, key: str, source: str) -> Place:
        converter = next(each for each in self._converters if source in each.source_patterns)
        found = _EXPERT.match(module)
        owner, _, parameter = key.rpartition(".")
        if not _merges_experts(converter) or found is None or owner not in self._modules:
            raise ExportError(
                f"Transformers fuses {module} into {key}, which PEFT has no layout for",
                hint="do not adapt this module",
            )
        sources = list(converter.source_patterns)
        expert = int(found["expert"])
        return Place("part", owner, parameter, expert, sources.index(source), len(sources))


def _check_no_buffer(router: nn.Module, module: str) -> None:
    """Refuse a router like DeepSeek's: its layer reads a buffer that PEFT's wrapper lacks."""
    if buffers := sorted(name for name, _ in router.named_buffers(recurse=False)):
        raise ExportError(
            f"PEFT cannot run a model whose {module} is adapted: its wrapper hides {buffers}",
            hint="do not adapt the router of this model",
        )


def _merges_experts(converter: WeightConverter) -> bool:
    return any(isinstance(each, MergeModulelist) for each in converter.operations)


def _build(hf_config: PretrainedConfig | dict[str, Any], *, has_score: bool) -> nn.Module:
    if isinstance(hf_config, dict):
        config = AutoConfig.for_model(**hf_config)
    else:
        config = copy.deepcopy(hf_config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if has_score:
        config.num_labels = 1
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)
    name = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
    architecture = getattr(transformers, name, AutoModelForCausalLM)
    build = getattr(architecture, "_from_config", None) or AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return build(config)
