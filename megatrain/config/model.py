"""How a model is held and run: precision, back end, recomputation, sizes of micro-batches."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

DEFAULT_TOKENS_PER_MICROBATCH = 4096
"""Token budget when neither a budget nor a number of data is given."""


class ModelConfig(BaseModel):
    """Options of MegatronModel that do not depend on an adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: Literal["causal_lm", "reward"] = "causal_lm"
    """Log-probabilities of tokens, or one score a sequence from a head of its own."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Type of parameters and activations; `no` is float32.  Master weights are float32 always."""
    backend: Literal["auto", "torch", "te"] = "auto"
    """Layers in plain torch, or Transformer Engine's; auto takes the latter where it can run."""
    bridge: Literal["megatron-bridge", "mcore-bridge", "mcore-adapter"] = "megatron-bridge"
    """Who converts the checkpoint while it loads; the others must be installed, and use Transformer
    Engine.  Names and exports are Megatron-Bridge's in any case."""
    recompute: bool = False
    """Recompute each layer's activations in backward: less memory, a third more work."""
    max_loras: PositiveInt | None = None
    """Adapters on the device at once, with their gradients and optimizers; None is all.  The least
    recently used go to the host's memory, and come back when they are used."""
    max_cpu_loras: PositiveInt | None = None
    """Adapters in the host's memory at once; None is all.  Further ones go to its disk."""
    max_tokens_per_microbatch: PositiveInt | None = None
    """Token budget of a packed micro-batch (before CP splits it).  A longer datum is alone."""
    micro_batch_size: PositiveInt | None = None
    """Data in a micro-batch, instead of a token budget."""

    @model_validator(mode="after")
    def _memory_is_for_what_is_not_on_the_device(self) -> Self:
        if self.max_cpu_loras is not None and self.max_loras is None:
            raise ValueError(f"max_cpu_loras={self.max_cpu_loras} has no effect without max_loras")
        return self

    @model_validator(mode="after")
    def _one_way_to_form_micro_batches(self) -> Self:
        if self.max_tokens_per_microbatch and self.micro_batch_size:
            raise ValueError(
                "micro-batches are formed by a token budget or by a number of data, not both: "
                f"max_tokens_per_microbatch={self.max_tokens_per_microbatch}, "
                f"micro_batch_size={self.micro_batch_size}"
            )
        return self
