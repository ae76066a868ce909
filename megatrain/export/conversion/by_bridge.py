"""Megatron-Bridge's own way to Megatron and back: what the conversions here are measured against.

The parts that AutoBridge's import_ckpt and export_ckpt are made of, without what they import for
training.  The model is made whole, in this process; it must have been initialized, alone.
"""

from pathlib import Path
from typing import Any

from megatrain.config.model import ModelConfig
from megatrain.export.conversion.carried import copy_files
from megatrain.model.provider import make_bridge, make_provider
from megatrain.parallel.groups import Groups
from megatrain.platforms.bridge_import import quiet


def to_megatron(folder: Path, out: Path, groups: Groups) -> None:
    """Read a Hugging Face checkpoint with Bridge's loader, and save it with Megatron."""
    from megatron.core import dist_checkpointing  # noqa: PLC0415 - patched first

    with quiet():
        bridge, model = _model(folder, groups)
        bridge.load_hf_weights([model])
        out.mkdir(parents=True)
        dist_checkpointing.save({"model": _state(model, groups)}, str(out))


def to_hugging_face(folder: Path, source: Path, out: Path, groups: Groups) -> None:
    """Load what Megatron saved, and write it with Bridge's writer and `folder`'s configuration."""
    from megatron.core import dist_checkpointing  # noqa: PLC0415 - patched first

    with quiet():
        bridge, model = _model(folder, groups)
        loaded = dist_checkpointing.load({"model": _state(model, groups)}, str(source))
        model.load_state_dict(loaded["model"])
        del loaded
        copy_files(folder, out)
        tensors = bridge._model_bridge.stream_weights_megatron_to_hf(
            [model], bridge.hf_pretrained, cpu=True, show_progress=False
        )
        bridge.hf_pretrained.state.source.save_generator(tensors, out, strict=True)


def _model(folder: Path, groups: Groups) -> tuple[Any, Any]:
    bridge = make_bridge(folder)
    provider = make_provider(bridge, ModelConfig(mixed_precision="bf16"), groups)
    provider.use_cpu_initialization, provider.perform_initialization = True, False
    return bridge, provider.provide()


def _state(model: Any, groups: Groups) -> Any:
    metadata = {"singleton_local_shards": False, "dp_cp_group": groups.data}
    return model.sharded_state_dict(metadata=metadata)
