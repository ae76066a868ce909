"""What crosses a layer: small frozen values.  No torch, no processes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

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
    lengths: NotRequired[Sequence[int]]
    """Lengths of the sequences that a packed datum is made of; their sum is its length."""
    position_ids: NotRequired[Sequence[int]]
    """0, 1, 2, ... in each sequence; where it starts again, another sequence begins."""


class Trajectory(TypedDict):
    """One conversation before a template encodes it."""

    messages: Sequence[Mapping[str, Any]]
    """Chat messages with role and content, as tokenizers' chat templates take them."""
    tools: NotRequired[Sequence[Mapping[str, Any]]]
    """JSON schemas of functions that the assistant may call."""
    user_data: NotRequired[Any]
    """What a reward needs to know, such as the true answer; no template looks at it."""


@runtime_checkable
class LazyRow(Protocol):
    """A datum (a Mapping too) that is read only where its tokens are needed.

    A plan over ranks needs its sizes alone; all ranks compare its key instead of its tokens.
    """

    key: str
    """Says which data it is: the same on every rank."""
    num_tokens: int
    """Length of input_ids."""
    num_labels: int
    """Labels that are predicted."""
    numbers: Collection[str]
    """Names of its columns that are made of numbers, which a loss may take."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A global batch whose loader can read what this rank needs of the batches after it."""

    def read_ahead(self, choose: Callable[[Sequence[int]], Sequence[int]]) -> None:
        """Take what says, from the lengths of a batch's rows, which of them this rank reads."""


@runtime_checkable
class Fetches(Protocol):
    """A global batch whose rows come to a rank when it is known which of them it reads."""

    def fetch(self, wanted: Sequence[Sequence[int]]) -> None:
        """Take the rows that each data parallel rank reads.  Collective over all ranks."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Result of a forward pass over a global batch: the same on every rank, in request order."""

    loss: float
    """The loss's sum over the global batch, divided by its divisor: for cross-entropy, the mean
    of -log p over this call's labels."""
    logps: list[FloatArray] = field(repr=False)
    """Per datum, as long as its input_ids: log p(labels[t] | input_ids[:t]); 0.0 at the start of a
    sequence and where there is no label.  With a score head: the score, at the last token."""
    num_tokens: int = 0
    """Labels in this call."""
    divisor: float = 0.0
    """What the loss's sum was divided by; gradients are divided by the sum of these at a step."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    """Means over this call of what the loss reports, token_accuracy among them."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """How many numbers each of those is a mean over."""
    squares: float = 0.0
    """Sum of the squared lengths of this call's sequences: what attention costs."""
    adapters: Mapping[str, "StepOutput"] = field(default_factory=dict, repr=False)
    """Where a call named an adapter for each datum: each adapter's own result."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """Of such a call: adapters whose loss failed or was not finite, and why.  Their gradients are
    as before the call, and their log-probabilities are NaN; the others' are what they should be."""


@dataclass(frozen=True, slots=True)
class AdapterBatch:
    """One adapter's data in a pass of several."""

    adapter: str
    inputs: Sequence[Any]
    """InputFeatures."""
    loss_inputs: Mapping[str, Any] = field(default_factory=dict)
    loss: tuple[str, Mapping[str, Any]] | None = None
    """Name and options of the loss of this pass, instead of the one that the adapter was given."""
