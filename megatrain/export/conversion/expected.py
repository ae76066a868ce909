"""Which tensors a Hugging Face checkpoint of a configuration has, asked of Transformers itself.

For a Megatron checkpoint that was not imported here and so carries no list.
"""

import json
from pathlib import Path

from transformers.core_model_loading import revert_weight_conversion

from megatrain.checkpoint.safetensors_file import TensorSpec
from megatrain.errors import CheckpointError
from megatrain.export.conversion.carried import Original
from megatrain.export.skeleton import Skeleton


def expected_originals(config_folder: Path) -> dict[str, Original]:
    """Return names and shapes as `save_pretrained` would write them, in one file.

    The model is made on the meta device, without values.  Raises CheckpointError.
    """
    path = config_folder / "config.json"
    try:
        config = json.loads(path.read_text())
        model = Skeleton(config).model
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot make a model of {path}: {error}") from error
    state = dict(model.state_dict())
    if getattr(model.config, "tie_word_embeddings", False):
        tied = getattr(model, "all_tied_weights_keys", None) or {"lm_head.weight": ""}
        state = {name: tensor for name, tensor in state.items() if name not in tied}
    saved = revert_weight_conversion(model, state)
    return {
        name: Original(TensorSpec(tensor.dtype, tuple(tensor.shape)), "model.safetensors")
        for name, tensor in saved.items()
    }
