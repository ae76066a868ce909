"""What losses on preference pairs share.  Data 2i are chosen, data 2i + 1 rejected; P pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatrain.train.loss import Loss, LossBatch, Statistics
from megatrain.train.losses.sums import label_counts, measure, sequence_sums, split_pairs

PAIR_STATISTICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class PairLoss(Loss):
    """Base of losses on pairs: the mean over pairs."""

    unit: ClassVar = 2
    statistics: ClassVar[Sequence[str]] = PAIR_STATISTICS

    def divisor(self, num_labels: Sequence[int]) -> float:
        """Return the number of pairs."""
        return len(num_labels) / 2


@dataclass(frozen=True, slots=True)
class Pairs:
    """One number for the chosen and one for the rejected answer of each pair, both (P,)."""

    chosen_P: Tensor
    rejected_P: Tensor

    def __truediv__(self, other: "Pairs") -> "Pairs":
        return Pairs(self.chosen_P / other.chosen_P, self.rejected_P / other.rejected_P)


def pair_sums(values_N: Tensor, batch: LossBatch) -> Pairs:
    """Return sums of `values_N` over the labels of each answer."""
    return Pairs(*split_pairs(sequence_sums(values_N, batch.sequence_N, batch.num_sequences)))


def pair_lengths(batch: LossBatch) -> Pairs:
    """Return the number of labels of each answer, at least 1."""
    return Pairs(*split_pairs(label_counts(batch.sequence_N, batch.num_sequences)))


def pair_statistics(rewards: Pairs, logps: Pairs) -> Statistics:
    """Return TRL's rewards/..., from implicit rewards, and logps/... of the answers."""
    chosen_P, rejected_P = rewards.chosen_P.detach(), rewards.rejected_P.detach()
    return {
        "rewards/chosen": measure(chosen_P),
        "rewards/rejected": measure(rejected_P),
        "rewards/accuracies": measure(chosen_P > rejected_P),
        "rewards/margins": measure(chosen_P - rejected_P),
        "logps/chosen": measure(logps.chosen_P),
        "logps/rejected": measure(logps.rejected_P),
    }
