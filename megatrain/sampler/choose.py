"""Which engine samples of a base model."""

from pathlib import Path

from megatrain.config.service import SamplerConfig
from megatrain.sampler.transformers_sampler import TransformersSampler
from megatrain.sampler.types import Sampler


def make_sampler(config: SamplerConfig, model: Path, *, is_float32: bool) -> Sampler | None:
    """Return the engine that `config` asks for, not yet started; None if nobody samples."""
    if config.engine == "none":
        return None
    return TransformersSampler(config, model, is_float32=is_float32)
