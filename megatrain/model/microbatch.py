"""One packed micro-batch as a rank sees it: its share of the tokens, and where results belong."""

from dataclasses import dataclass

from torch import Tensor

from megatrain_kernels.torch_backend.core_attention import PackedSequences


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
    weights_N: Tensor
    """Weight of each in the loss, float32; a dummy's is 0."""
    slots_N: Tensor
    """Where each result goes in the flat global result; -1 for a dummy."""
