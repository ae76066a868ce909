"""Which engine samples of a base model."""

from pathlib import Path

from megatrain.config.service import SamplerConfig
from megatrain.errors import ConfigError
from megatrain.sampler.transformers_sampler import TransformersSampler
from megatrain.sampler.types import Sampler


def make_sampler(config: SamplerConfig, model: Path, *, is_float32: bool) -> Sampler | None:
    """Return the engine that `config` asks for, not yet started; None if nobody samples.

    Raises ConfigError for one that this version has not.
    """
    if config.engine == "none":
        return None
    of_vllm = config.address or config.python or config.options or config.tp > 1
    if config.engine == "vllm" or of_vllm:
        raise ConfigError(
            "the engine vllm, and its address, python, tp and options, are not here yet",
            hint="sampler='transformers', or 'none'",
        )
    return TransformersSampler(config, model, is_float32=is_float32)
