"""What a loss is: a sum over the labels, sequences or pairs of a global batch, and its divisor."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from megatrain.errors import ConfigError

Statistics = Mapping[str, tuple[Tensor, Tensor | float]]
"""By name: a sum and a count, both without gradient.  What is reported is sum / count."""


@dataclass(frozen=True, slots=True)
class LossInput:
    """What a call of forward_backward gives beside the data, one entry a datum."""

    kind: Literal["token", "sequence", "top_k"] = "token"
    """token: a number a label, or one number for all labels of a datum.  sequence: one number a
    datum.  top_k: K numbers a label."""
    required: bool = True
    integer: bool = False
    """int64 instead of float32."""


@dataclass(frozen=True, slots=True)
class LossBatch:
    """One micro-batch of S whole sequences with N labels, in the order of the data.

    Under context parallelism every rank sees all labels of its sequences; gradients reach those
    log-probabilities that it computed itself.
    """

    logps_N: Tensor
    """log p(label), float32, with gradient."""
    sequence_N: Tensor
    """Which of the S sequences a label belongs to, int64, ascending."""
    num_sequences: int
    """S; a micro-batch that is padding alone has 0 sequences and 0 labels."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What the call gave, by name: (N,), (S,) or (N, K)."""
    top_logps_NK: Tensor | None = None
    """log p of the tokens `teacher_tokens` (N, K), float32, with gradient."""
    scores_S: Tensor | None = None
    """The score head's value at each sequence's last token, float32, with gradient."""


class Loss(ABC):
    """Base class of losses.  A subclass states what it needs and returns sums.

    Options are keyword arguments of the constructor; an unknown one is an error.
    """

    inputs: ClassVar[Mapping[str, LossInput]] = {}
    """Per-call inputs by name."""
    unit: ClassVar[int] = 1
    """So many consecutive data belong together (2: chosen, rejected) and share a micro-batch."""
    statistics: ClassVar[Sequence[str]] = ()
    """Names of what is reported beside the loss."""
    by_sequence: ClassVar[bool] = False
    """Needs to know where a sequence ends: a datum that packs several is refused."""
    uses_scores: ClassVar[bool] = False
    """Needs a model with a score head instead of log-probabilities."""

    @property
    def is_sum(self) -> bool:
        """Whether gradients are plain sums, also over several calls before a step."""
        return False

    @abstractmethod
    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        """Return the sum of the loss over this micro-batch, a scalar, and statistics.

        Sums over micro-batches and data parallel ranks make the global batch; nothing is divided
        here that depends on other data than one unit.
        """

    def divisor(self, num_labels: Sequence[int]) -> float:
        """Return what the sum over a global batch is divided by, from the labels of each datum.

        The mean over labels unless overridden.  Divisors of several calls add up before a step.
        """
        return float(sum(num_labels))


@dataclass(frozen=True, kw_only=True)
class LabelLoss(Loss):
    """Base of losses that add up over labels."""

    reduction: Literal["mean", "sum"] = "mean"
    """mean: over the labels of all calls before a step.  sum: nothing is divided, as in Tinker's
    API; calls with one and with the other may not stand before the same step."""

    def __post_init__(self) -> None:
        """Raise ConfigError for an unknown reduction."""
        if self.reduction not in ("mean", "sum"):
            raise ConfigError(f"reduction must be mean or sum, not {self.reduction!r}")

    @property
    def is_sum(self) -> bool:
        """Whether gradients are plain sums."""
        return self.reduction == "sum"

    def divisor(self, num_labels: Sequence[int]) -> float:
        """Return the number of labels, or 1."""
        return 1.0 if self.is_sum else float(sum(num_labels))
