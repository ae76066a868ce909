"""Tiny real checkpoints of real architectures, with random weights, made by Transformers."""

from pathlib import Path
from typing import Any

from megatrain.testing.families import ARCHITECTURES, COMMON, FAMILIES, TOWERS

__all__ = ["COMMON", "FAMILIES", "make_checkpoint"]


def make_checkpoint(folder: Path, family: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random checkpoint of a family to `folder` in float32 and return the folder.

    Biases and sinks, which Transformers makes zero, are random too, so that nothing can be dropped
    unseen.
    """
    import torch  # noqa: PLC0415 - the module's names are used without torch
    import transformers  # noqa: PLC0415

    class_name, own = ARCHITECTURES[family]
    kind = transformers.AutoModelForCausalLM
    settings = {**COMMON, **own, **changes}
    if family in TOWERS:
        kind = transformers.AutoModelForImageTextToText
        text = {**COMMON, **own["text_config"], **changes}
        settings = {**own, "text_config": text, "tie_word_embeddings": False}
    config = getattr(transformers, class_name)(**settings)
    torch.manual_seed(seed)
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder
