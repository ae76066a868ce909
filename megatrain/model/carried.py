"""What a Hugging Face configuration says and a Megatron provider must carry, or be refused.

A bridge may leave a setting out; the model would then be another one, without a word.
"""

from typing import Any

from megatrain.errors import UnknownFamilyError

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron's scaled rotary embedding takes for granted."""


def check_carried(config: Any, provider: Any) -> None:
    """Raise UnknownFamilyError for a rotary or window setting that the provider does not carry."""
    if not getattr(provider, "multi_latent_attention", False):
        _check_rotary(getattr(config, "rope_parameters", None) or {}, provider)
    _check_window(config, provider)


def _check_rotary(rope: dict[str, Any], provider: Any) -> None:
    if any(isinstance(value, dict) for value in rope.values()):
        return  # one setting for each kind of layer: the family's bridge is made for it
    kind = rope.get("rope_type", "default")
    factor = rope.get("factor")
    embedding = provider.position_embedding_type
    interpolation = getattr(provider, "seq_len_interpolation_factor", None)
    scaled = bool(getattr(provider, "rope_scaling", False))
    carried = {
        "default": embedding == "rope" and not scaled and interpolation in (None, 1.0),
        "linear": embedding == "rope" and not scaled and interpolation == factor,
        "llama3": embedding == "rope"
        and scaled
        and getattr(provider, "rope_scaling_factor", None) == factor
        and all(rope.get(key, value) == value for key, value in LLAMA3.items()),
        "yarn": embedding == "yarn"
        and getattr(provider, "yarn_rotary_scaling_factor", None) == factor
        and rope.get("original_max_position_embeddings")
        == getattr(provider, "yarn_original_max_position_embeddings", None),
    }
    if embedding in ("rope", "yarn") and not carried.get(kind, False):
        raise UnknownFamilyError(
            f"this family's bridge does not carry rope_parameters={rope}: Megatron would use "
            f"{embedding!r} with scaling={scaled}, interpolation={interpolation}",
            hint="log-probabilities would differ from Transformers'; see bridges/README.md",
        )


def _check_window(config: Any, provider: Any) -> None:
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        window = None
    if window is not None and window < config.max_position_embeddings and not provider.window_size:
        raise UnknownFamilyError(
            f"this family's bridge does not carry sliding_window={window}",
            hint="log-probabilities would differ from Transformers'; see bridges/README.md",
        )
