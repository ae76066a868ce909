"""What crosses a layer: small frozen values.  No torch, no processes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

IGNORED_LABEL = -100
"""A label with this value takes no part in the loss, as in Transformers."""


class InputFeature(TypedDict):
    """One datum as a user gives it."""

    input_ids: Sequence[int]
    """Token ids, each in [0, vocabulary size)."""
    labels: NotRequired[Sequence[int]]
    """As long as input_ids; IGNORED_LABEL is not trained on.  The shift by one happens inside."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Result of a forward pass over a global batch: the same on every rank, in request order."""

    loss: float
    """Mean of -log p over this call's label tokens, over all ranks."""
    logps: list[FloatArray] = field(repr=False)
    """Per datum, as long as its input_ids: log p(labels[t] | input_ids[:t]); 0.0 at t = 0 and
    where there is no label."""
    num_tokens: int = 0
    """Label tokens in this call."""
