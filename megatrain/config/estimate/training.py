"""How a model is trained, as far as memory and time depend on it."""

from dataclasses import dataclass
from typing import Any, Literal

from megatrain.config.lora import LoraSpec
from megatrain.config.model import DEFAULT_TOKENS_PER_MICROBATCH
from megatrain.errors import ConfigError

BYTES = {"no": 4, "bf16": 2, "fp16": 2}
"""Of one entry, by mixed_precision."""

MOMENTS = {"default": 2, "AdamW": 2, "Adam": 2, "SGD": 0, "Muon": 2}
"""Float32 numbers that an optimizer keeps for each entry.  Muon keeps one for matrices, and AdamW
two for the rest: two is the upper bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is trained, in which precision, and on how many tokens.  Raises ConfigError."""

    precision: Literal["no", "bf16", "fp16"] = "bf16"
    """As mixed_precision: `no` is float32."""
    lora: Any = None
    """LoraSpec, dict or peft.LoraConfig; None: all parameters are trained."""
    optimizer: str | None = "AdamW"
    """None: only forward passes, nothing is trained."""
    offload_optimizer: bool = False
    """Keep float32 masters and moments in the host's memory, and do the step there."""
    recompute: bool = False
    """Keep each layer's input alone, and compute the layer again in backward."""
    sequence_length: int = 1024
    """Tokens of one sequence."""
    tokens_per_microbatch: int | None = None
    """Of a packed micro-batch before CP splits it; None: 4096, or one sequence if it is longer."""
    tokens_per_step: int | None = None
    """Of a global batch; None: a micro-batch for each data parallel rank and pipeline stage."""
    label_fraction: float = 1.0
    """Share of tokens that have a label."""

    def __post_init__(self) -> None:
        if self.precision not in BYTES:
            raise ConfigError(f"precision must be one of {', '.join(BYTES)}: {self.precision!r}")
        if self.optimizer is not None and self.optimizer not in MOMENTS:
            raise ConfigError(
                f"no memory arithmetic for optimizer {self.optimizer!r}; known: "
                f"{', '.join(MOMENTS)}"
            )
        for name in ("sequence_length", "tokens_per_microbatch", "tokens_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1: {value}")
        if not 0 <= self.label_fraction <= 1:
            raise ConfigError(f"label_fraction must be in [0, 1]: {self.label_fraction}")
        if self.lora is not None:
            object.__setattr__(self, "lora", LoraSpec.from_any(self.lora))

    @property
    def bytes(self) -> int:
        """Bytes of one weight or activation."""
        return BYTES[self.precision]

    @property
    def trains_all(self) -> bool:
        """Whether the base model itself is trained."""
        return self.optimizer is not None and self.lora is None

    @property
    def microbatch(self) -> int:
        """Tokens of one micro-batch, before CP."""
        if self.tokens_per_microbatch is not None:
            return self.tokens_per_microbatch
        return max(DEFAULT_TOKENS_PER_MICROBATCH, self.sequence_length)
