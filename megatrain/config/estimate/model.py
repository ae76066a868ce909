"""The sizes of a model, read from a Hugging Face config.json.  No torch, no weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatrain.config.names import nearest
from megatrain.errors import ConfigError, UnknownFamilyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a family's config.json does not say, or says under a name of its own."""

    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    expert_bias: bool = False
    """Biases on the router and on the experts' linears."""
    is_latent: bool = False
    """Multi-head latent attention."""
    is_moe: bool = False


FAMILIES: Mapping[str, Traits] = {
    "llama": Traits(),
    "mistral": Traits(),
    "qwen2": Traits(qkv_bias=True),
    "qwen3": Traits(qk_norm=True),
    "qwen3_moe": Traits(qk_norm=True, is_moe=True),
    "deepseek_v3": Traits(is_latent=True, is_moe=True),
    "gpt_oss": Traits(qkv_bias=True, o_bias=True, sinks=True, expert_bias=True, is_moe=True),
}
"""By model_type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Sizes of multi-head latent attention."""

    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Sizes of a mixture of experts."""

    count: int
    per_token: int
    ffn: int
    shared_ffn: int
    """Width of all shared experts together."""
    is_moe: tuple[bool, ...]
    """By layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Everything that decides how many parameters there are, and how much a token costs."""

    model_type: str
    traits: Traits
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    """Key/value heads."""
    head_dim: int
    tied: bool
    latent: Latent | None = None
    experts: Experts | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the sizes.

        Raises UnknownFamilyError for a model_type that this arithmetic does not know, ConfigError
        that names a field which is missing or of which it knows nothing.
        """
        config = config.get("text_config") or config
        kind = str(config.get("model_type"))
        if kind not in FAMILIES:
            raise UnknownFamilyError(
                f"no memory arithmetic for model_type {kind!r}; known: {', '.join(FAMILIES)}",
                hint=nearest(kind, FAMILIES) or "its training may work all the same",
            )
        traits, read = FAMILIES[kind], _Reader(config)
        _refuse_other_layers(config)
        heads, hidden = read("num_attention_heads"), read("hidden_size")
        return cls(
            model_type=kind,
            traits=_own_traits(traits, config),
            vocab=read("vocab_size"),
            hidden=hidden,
            ffn=read("intermediate_size"),
            layers=read("num_hidden_layers"),
            heads=heads,
            groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            tied=bool(config.get("tie_word_embeddings", False)),
            latent=_latent(read) if traits.is_latent else None,
            experts=_experts(read) if traits.is_moe else None,
        )

    def is_moe(self, layer: int) -> bool:
        """Tell whether this layer has experts."""
        return self.experts is not None and self.experts.is_moe[layer]

    @property
    def value_dim(self) -> int:
        """Size of one head's value, and of its output."""
        return self.head_dim if self.latent is None else self.latent.value

    @property
    def attention_width(self) -> float:
        """Query heads times head size (of query and value, on average) over all layers."""
        if self.latent is None:
            return float(self.layers * self.heads * self.head_dim)
        size = (self.latent.nope + self.latent.rope + self.latent.value) / 2
        return self.layers * self.heads * size


class _Reader:
    """Reads whole numbers, and names what is missing."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def __call__(self, *names: str) -> int:
        for name in names:
            value = self.config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
        kind = self.config.get("model_type")
        raise ConfigError(
            f"config.json of a {kind} needs a whole number {' or '.join(names)}: "
            f"{self.config.get(names[0])!r}"
        )


def read_config(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return config.json given as a mapping, a file, or a folder that has one.

    Raises ConfigError if there is none or it is not JSON.
    """
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"no config.json at {path}", hint="give a checkpoint's folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"not JSON: {path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"not a configuration: {path}")
    return config


def _own_traits(traits: Traits, config: Mapping[str, Any]) -> Traits:
    if config.get("attention_bias") and not (traits.qkv_bias or traits.sinks):
        raise ConfigError(
            "attention_bias is not in this arithmetic: "
            f"model_type={config['model_type']}, attention_bias={config['attention_bias']}"
        )
    return traits


def _refuse_other_layers(config: Mapping[str, Any]) -> None:
    known = {"full_attention", "sliding_attention"}
    if other := sorted(set(config.get("layer_types") or ()) - known):
        raise ConfigError(f"layers of type {', '.join(other)} are not in this arithmetic")


def _latent(read: _Reader) -> Latent:
    return Latent(
        q_rank=read.config.get("q_lora_rank"),
        kv_rank=read("kv_lora_rank"),
        nope=read("qk_nope_head_dim"),
        rope=read("qk_rope_head_dim"),
        value=read("v_head_dim"),
    )


def _experts(read: _Reader) -> Experts:
    config, layers = read.config, read("num_hidden_layers")
    ffn = config.get("moe_intermediate_size") or read("intermediate_size")
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    first = config.get("first_k_dense_replace", 0)
    return Experts(
        count=read("num_experts", "num_local_experts", "n_routed_experts"),
        per_token=read("num_experts_per_tok"),
        ffn=ffn,
        shared_ffn=ffn * (config.get("n_shared_experts") or 0),
        is_moe=tuple(i >= first and i not in dense and (i + 1) % step == 0 for i in range(layers)),
    )
