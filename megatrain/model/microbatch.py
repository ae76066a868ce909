"""One packed micro-batch as a rank sees it: its share of the tokens, and where results belong."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megatrain.model.mixture import Mixture
from megatrain_kernels.torch_backend.core_attention import PackedSequences


@dataclass(frozen=True, slots=True)
class WholeLabels:
    """What a loss knows of a micro-batch: all M labels of S sequences, on every CP rank."""

    sequence_M: Tensor
    """Which sequence a label belongs to, int64, ascending."""
    num_sequences: int
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Per-call loss inputs: (M,), (S,) or (M, K)."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """T tokens on this rank (after CP, before sequence parallelism), N of them with a label."""

    input_ids_1T: Tensor
    """int64."""
    positions_1T: Tensor
    """Position of each token in its own sequence, int64."""
    packed: PackedSequences
    label_index_N: Tensor
    """Which of the T tokens predict a label; at least one entry, a dummy if there is none."""
    targets_N: Tensor
    """The labels they predict."""
    places_N: Tensor
    """Which of the M labels each is; -1 for a dummy."""
    has_labels: bool
    """False if the only entry is a dummy."""
    slots_N: Tensor
    """Where each result goes in the flat global result; -1 for a dummy."""
    labels: WholeLabels
    squares: float
    """Sum of the squared lengths of its sequences, without padding, on all CP ranks together."""
    extra_targets_NK: Tensor | None = None
    """Further tokens whose log-probabilities are wanted, int64."""
    mixture: Mixture | None = None
    """Whose tokens are whose; None if all are of the active adapter."""
    parts: tuple[WholeLabels, ...] = ()
    """Of a mixture: the labels of each of its adapters."""
