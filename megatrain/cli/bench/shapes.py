"""The models that a benchmark may run, and how long their data are.  Torch-free, no weights."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long the data of a batch are: 15 % short, 70 % middle, 15 % long."""

    count: int
    """Data in the batch."""
    shortest: int
    """Tokens."""
    longest: int
    """Tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model with random weights, and the batch that it is measured on."""

    config_class: str
    """Transformers' name."""
    fields: dict[str, Any]
    """What the configuration is made from; the rest are the class's own defaults."""
    lengths: Lengths
    dtype: str = "bf16"
    """Default of --dtype."""
    max_tokens: int = 4096
    """Default of --max-tokens."""
    both_fit: bool = True
    """Whether two of it fit on one device, so that the two systems can take turns."""

    @property
    def is_moe(self) -> bool:
        """Whether the model has experts."""
        return "num_experts" in self.fields


_COMMON: dict[str, Any] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}

SHAPES: dict[str, Shape] = {
    "tiny": Shape(
        config_class="Qwen3Config",
        fields={
            **_COMMON,
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
        },
        lengths=Lengths(count=8, shortest=5, longest=64),
        dtype="float32",
        max_tokens=256,
    ),
    # 77 million parameters: 32.8 in embedding and head, 44.1 in the layers.
    "100m": Shape(
        config_class="Qwen3Config",
        fields={
            **_COMMON,
            "vocab_size": 32_000,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 14,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "max_position_embeddings": 4096,
        },
        lengths=Lengths(count=12, shortest=27, longest=1024),
        dtype="float32",
    ),
    "qwen3-8b": Shape(
        config_class="Qwen3Config",
        fields={
            **_COMMON,
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        lengths=Lengths(count=32, shortest=64, longest=4096),
        max_tokens=8192,
    ),
    # Transformers' defaults for this class are this model's.
    "qwen3.5-9b": Shape(
        config_class="Qwen3_5TextConfig",
        fields={**_COMMON, "num_hidden_layers": 32, "vocab_size": 248_320},
        lengths=Lengths(count=32, shortest=64, longest=4096),
        max_tokens=8192,
    ),
    "qwen3-30b-a3b": Shape(
        config_class="Qwen3MoeConfig",
        fields={
            **_COMMON,
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        lengths=Lengths(count=16, shortest=64, longest=4096),
        max_tokens=8192,
        both_fit=False,
    ),
}
"""By the name that --shape takes."""
