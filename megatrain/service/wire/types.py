"""What a training request and its result are, once bodies are parsed.  No torch, no HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Array = IntArray | FloatArray


@dataclass(frozen=True, slots=True)
class Datum:
    """One datum of forward_backward."""

    tokens: IntArray
    """[N], the model's input."""
    inputs: Mapping[str, Array]
    """Loss inputs by name, dense: float32 or int64, [N], [N, K] or [1]."""


@dataclass(frozen=True, slots=True)
class PassRequest:
    """forward_backward, or forward_only."""

    model_id: str
    seq_id: int
    data: Sequence[Datum]
    loss_fn: str
    loss_config: Mapping[str, float | str] = field(default_factory=dict)
    forward_only: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of all data."""
        return sum(len(datum.tokens) for datum in self.data)


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass gives back."""

    outputs: Sequence[Mapping[str, FloatArray]]
    """By datum: `logprobs`, of the shape of target_tokens."""
    metrics: Mapping[str, float]
    """`loss:sum` and others; every name has exactly one colon."""
    output_type: str = "ArrayRecord"
