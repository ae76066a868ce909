"""Which engine samples of a base model."""

from pathlib import Path

from megatrain.config.service import SamplerConfig
from megatrain.sampler.transformers_sampler import TransformersSampler
from megatrain.sampler.types import Sampler
from megatrain.sampler.vllm.environment import find, has_cuda
from megatrain.sampler.vllm.sampler import VllmSampler


def make_sampler(config: SamplerConfig, model: Path, *, is_float32: bool) -> Sampler | None:
    """Return the engine that `config` asks for, not yet started; None if nobody samples.

    Raises ConfigError, for vLLM where it is not installed.
    """
    engine = config.engine
    if engine == "auto":
        engine = "vllm" if _is_vllm_at_hand() else "transformers"
    match engine:
        case "none":
            return None
        case "vllm":
            environment = None if config.address is not None else find()
            return VllmSampler(config, model, is_float32=is_float32, environment=environment)
        case _:
            return TransformersSampler(config, model, is_float32=is_float32)


def _is_vllm_at_hand() -> bool:
    """On processors Transformers is as fast, and starts sooner."""
    environment = find()
    return environment is not None and not environment.is_cpu and has_cuda()
