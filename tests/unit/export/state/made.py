"""Small checkpoints with a training state, made without a model."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatrain.export.folder import replaced
from megatrain.export.state.folder import State
from megatrain.export.state.record import OptimizerRecord, StateRecord, has_state


def record(**changes: Any) -> StateRecord:
    """Return a record of an adapter after three steps."""
    fields: dict[str, Any] = {
        "megatrain": "0.1.0",
        "saved_at": 1000.0,
        "adapter": "default",
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "base_model": "some/model",
        "fingerprint": {"model_type": "qwen3", "hidden_size": 64},
        "layout": "tp2",
        "mixed_precision": "bf16",
        "seed": 42,
        "step": 3,
        "num_calls": 0,
        "num_passes": 0,
        "accumulation_steps": 1,
        "consumed_train_samples": 24,
        "optimizer": OptimizerRecord(
            kind="AdamW", options={"lr": 1e-4, "betas": (0.9, 0.95)}, counters={"step": 3.0}
        ),
        "schedule": None,
        "gradients": None,
        "tensors": ("master", "exp_avg"),
    }
    return StateRecord(**fields | changes)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the factors of one module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.layers.0.self_attn.q_proj.lora_A": torch.randn(2, 64, generator=generator),
        "model.layers.0.self_attn.q_proj.lora_B": torch.randn(64, 2, generator=generator),
    }


def checkpoint(directory: Path, **changes: Any) -> Path:
    """Write an adapter with a state, as a save does; each kind has a file for each tensor."""
    batches = [
        (kind, {name: value})
        for seed, kind in enumerate(("master", "exp_avg"))
        for name, value in tensors(seed).items()
    ]
    with replaced(directory, may_replace=has_state) as folder:
        save_file(tensors(), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")
        State(record(**changes), iter(batches)).write(folder)
    return directory
