"""What a Hugging Face configuration says and a Megatron provider must carry, or be refused.

A bridge may leave a setting out; the model would then be another one, without a word.  Some are
carried here for all families: linear scaling of positions, YaRN's defaults, windows on some layers,
soft-capped logits.
"""

from typing import Any

from megatrain.errors import UnknownFamilyError

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron's scaled rotary embedding takes for granted."""

YARN = {
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_correction_range_round_to_int": True,
}
"""What Transformers takes where a configuration says nothing."""

HINT = "log-probabilities would differ from Transformers'; see bridges/README.md"


def carry(config: Any, provider: Any) -> None:
    """Set on the provider what the family's bridge leaves out and Megatron can do all the same."""
    rope = getattr(config, "rope_parameters", None) or {}
    is_latent = getattr(provider, "multi_latent_attention", False)
    if rope.get("rope_type") == "linear" and not is_latent:
        provider.seq_len_interpolation_factor = rope["factor"]
    if provider.position_embedding_type == "yarn":
        for name, value in YARN.items():
            if getattr(provider, name, None) is None:
                setattr(provider, name, value)
    # The head applies it; a bridge's provider may have a default where the checkpoint has none.
    provider.final_logit_softcapping = getattr(config, "final_logit_softcapping", None) or None
    window, kinds = _window(config), getattr(config, "layer_types", None)
    if window is not None and kinds is not None and not provider.window_size:
        provider.window_size = (window - 1, 0)
        provider.window_attn_skip_freq = [int(kind == "sliding_attention") for kind in kinds]


def check_carried(config: Any, provider: Any) -> None:
    """Raise UnknownFamilyError for a setting that the provider does not carry."""
    if not getattr(provider, "multi_latent_attention", False):
        rope = getattr(config, "rope_parameters", None) or {}
        if not any(isinstance(value, dict) for value in rope.values()):
            # Else there is one for each kind of layer: the family's bridge is made for it.
            _check_rotary(rope, provider)
            _check_rotary_sizes(config, rope, provider)
    _check_window(config, provider)
    _check_caps(config, provider)
    _check_equal("rms_norm_eps", getattr(config, "rms_norm_eps", None), provider.layernorm_epsilon)


def _check_rotary(rope: dict[str, Any], provider: Any) -> None:
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
        and rope.get("attention_factor") is None
        and getattr(provider, "yarn_rotary_scaling_factor", None) == factor
        and rope.get("original_max_position_embeddings")
        == getattr(provider, "yarn_original_max_position_embeddings", None),
    }
    if embedding in ("rope", "yarn") and not carried.get(kind, False):
        raise UnknownFamilyError(
            f"this family's bridge does not carry rope_parameters={rope}: Megatron would use "
            f"{embedding!r} with scaling={scaled}, interpolation={interpolation}",
            hint=HINT,
        )


def _check_rotary_sizes(config: Any, rope: dict[str, Any], provider: Any) -> None:
    if provider.position_embedding_type not in ("rope", "yarn"):
        return
    _check_equal("rope_theta", rope.get("rope_theta"), provider.rotary_base)
    part = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    _check_equal("partial_rotary_factor", part, provider.rotary_percent)


def _check_equal(name: str, wanted: Any, carried: Any) -> None:
    if wanted is not None and abs(wanted - carried) > 1e-6 * abs(wanted):
        raise UnknownFamilyError(
            f"this family's bridge does not carry {name}={wanted}: Megatron would use {carried}",
            hint=HINT,
        )


def _window(config: Any) -> int | None:
    """Return the window of attention if some layer has one that is shorter than the model."""
    window: int | None = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return window if window < config.max_position_embeddings else None


def _check_window(config: Any, provider: Any) -> None:
    window = _window(config)
    if window is not None and not provider.window_size:
        raise UnknownFamilyError(
            f"this family's bridge does not carry sliding_window={window}", hint=HINT
        )


def _check_caps(config: Any, provider: Any) -> None:
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap and getattr(provider, "attn_logit_softcapping", None) != cap:
        raise UnknownFamilyError(
            f"this family's bridge does not carry attn_logit_softcapping={cap}", hint=HINT
        )
