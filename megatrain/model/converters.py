"""Who turns a Hugging Face checkpoint into Megatron's model: Bridge, or another converter.

Names, LoRA targets and exports always come from AutoBridge's registry, which must know the family
too; a converter that names its parameters otherwise is refused there.
"""

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from megatrain.config.model import ModelConfig
from megatrain.errors import ConfigError
from megatrain.model.provider import DTYPES
from megatrain.parallel.layout import DeviceMesh


class Converter(Protocol):
    """Makes this rank's model chunks, with the checkpoint's weights.  Collective."""

    name: str

    def build(self, folder: Path, config: ModelConfig, mesh: DeviceMesh) -> list[torch.nn.Module]:
        """Return the chunks, one for each virtual pipeline stage, in the wanted precision.

        Raises ConfigError if the package is not there or is another one of that name.
        """
        ...


class McoreBridge:
    """ModelScope's mcore-bridge: https://github.com/modelscope/mcore-bridge."""

    name = "mcore-bridge"

    def build(self, folder: Path, config: ModelConfig, mesh: DeviceMesh) -> list[torch.nn.Module]:
        """Make its model and let it load the weights."""
        from transformers import AutoConfig  # noqa: PLC0415 - Megatron is prepared first

        package = find("mcore_bridge", "mcore-bridge", wanted=("ModelConfig", "get_mcore_model"))
        described = package.hf_to_mcore_config(AutoConfig.from_pretrained(folder))
        theirs = package.ModelConfig(
            params_dtype=DTYPES[config.mixed_precision],
            sequence_parallel=mesh.tp > 1,
            **_sizes(mesh),
            **described,
        )
        chunks = list(package.get_mcore_model(theirs))
        theirs.bridge.load_weights(chunks, str(folder))
        return chunks


class McoreAdapter:
    """ROLL's mcore_adapter: https://github.com/alibaba/ROLL, in its folder mcore_adapter."""

    name = "mcore-adapter"

    def build(self, folder: Path, config: ModelConfig, mesh: DeviceMesh) -> list[torch.nn.Module]:
        """Let it make the model and load the weights."""
        models = find("mcore_adapter.models", "mcore-adapter", wanted=("AutoModel",))
        package = importlib.import_module("mcore_adapter")
        arguments = package.TrainingArguments(
            output_dir=str(folder),
            bf16=config.mixed_precision == "bf16",
            fp16=config.mixed_precision == "fp16",
            sequence_parallel=mesh.tp > 1,
            **_sizes(mesh),
        )
        return list(models.AutoModel.from_pretrained(str(folder), arguments).get_models())


CONVERTERS: dict[str, Converter] = {each.name: each for each in (McoreBridge(), McoreAdapter())}
"""Those beside Megatron-Bridge, whose model `build_network` makes itself."""

_IMPOSTORS = {
    "mcore-adapter": "the package of this name on PyPI is unrelated to ROLL's mcore_adapter",
}


def find(module: str, distribution: str, *, wanted: tuple[str, ...]) -> Any:
    """Import a converter's module.

    Raises ConfigError if it is not installed, or what is installed under its name is another
    package.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"bridge={distribution!r} needs the module {module}: {_reason(distribution, error)}",
            hint="use bridge='megatron-bridge', or install the converter from its own repository",
        ) from error
    lacking = [name for name in wanted if not hasattr(found, name)]
    if lacking:
        raise ConfigError(
            f"{module} is not the converter that bridge={distribution!r} means: it has no "
            f"{', '.join(lacking)}",
            hint="use bridge='megatron-bridge', or install the converter from its own repository",
        )
    return found


def _reason(distribution: str, error: ImportError) -> str:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"it is not installed ({error})"
    text = f"{distribution} {version} is installed, but does not import: {error}"
    return f"{text}; {_IMPOSTORS[distribution]}" if distribution in _IMPOSTORS else text


def _sizes(mesh: DeviceMesh) -> dict[str, int | None]:
    return {
        "tensor_model_parallel_size": mesh.tp,
        "pipeline_model_parallel_size": mesh.pp,
        "virtual_pipeline_model_parallel_size": mesh.vpp if mesh.vpp > 1 else None,
        "context_parallel_size": mesh.cp,
        "expert_model_parallel_size": mesh.ep,
        "expert_tensor_parallel_size": mesh.etp,
    }
