"""KTO: answers that are each good or bad, without pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatrain.errors import ConfigError
from megatrain.train.loss import Loss, LossBatch, LossInput, Statistics
from megatrain.train.losses.options import check_choice, check_number
from megatrain.train.losses.sums import measure, sequence_sums

LOSS_TYPES = ("kto", "apo_zero_unpaired")


def kto(
    log_ratio_S: Tensor,
    desirable_S: Tensor,
    kl_S: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return (S,) weight * (1 - sigmoid(+-beta * (log ratio - kl))), + where desirable.

    log_ratio_S is the sum of log p - reference log p over an answer's labels; desirable_S is
    boolean; kl_S the reference point, without gradient.  Ethayarajh et al. 2024 (2402.01306),
    equation 7.  With a reference point of 0: APO-zero for single answers (2408.06266).
    """
    gain_S = beta * (log_ratio_S - kl_S)
    # 1 - sigmoid(x) = sigmoid(-x)
    good_S = desirable_weight * (-gain_S).sigmoid()
    return torch.where(desirable_S, good_S, undesirable_weight * gain_S.sigmoid())


@dataclass(frozen=True, kw_only=True)
class KTOLoss(Loss):
    """KTO, the mean over data; calls give `ref_logps`, `label` and `kl`.

    `label` is True or 1 for a desirable answer, False, 0 or -1 for another.  `kl` is the reference
    point, the same number for every datum of a global batch: the mean over the batch of
    log(policy / reference) of answers under prompts that they do not belong to (each prompt with
    its neighbour's answer), from two calls of forward_only.  It counts as 0 where it is negative.
    """

    beta: float = 0.1
    loss_type: str = "kto"
    """apo_zero_unpaired: a reference point of 0, no `kl`."""
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl: float | None = None
    """A reference point for the whole run, at least 0, instead of one a call."""

    by_sequence: ClassVar = True
    statistics: ClassVar = (
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "kl",
    )

    def __post_init__(self) -> None:
        """Raise ConfigError where an option is out of range or without effect."""
        check_number("beta", self.beta, above=0)
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_number("desirable_weight", self.desirable_weight, at_least=0)
        check_number("undesirable_weight", self.undesirable_weight, at_least=0)
        if self.kl is None:
            return
        check_number("kl", self.kl, at_least=0)
        if self.loss_type != "kto":
            raise ConfigError(f"loss_type={self.loss_type!r} has no reference point: kl={self.kl}")

    @property
    def inputs(self) -> Mapping[str, LossInput]:  # type: ignore[override]
        """ref_logps, label, and kl unless it is an option."""
        needed = {"ref_logps": LossInput(), "label": LossInput(kind="sequence")}
        if self.loss_type != "kto" or self.kl is not None:
            return needed
        return {**needed, "kl": LossInput(kind="sequence")}

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        size = (batch.sequence_N, batch.num_sequences)
        logps_S = sequence_sums(batch.logps_N, *size)
        log_ratio_S = sequence_sums(batch.logps_N - batch.inputs["ref_logps"], *size)
        desirable_S = batch.inputs["label"] > 0
        kl_S = self._reference_point(batch)
        loss_S = kto(
            log_ratio_S,
            desirable_S,
            kl_S,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        rewards_S = self.beta * log_ratio_S
        return loss_S.sum(), {
            "rewards/chosen": measure(rewards_S[desirable_S]),
            "rewards/rejected": measure(rewards_S[~desirable_S]),
            "logps/chosen": measure(logps_S[desirable_S]),
            "logps/rejected": measure(logps_S[~desirable_S]),
            "kl": measure(kl_S),
        }

    def _reference_point(self, batch: LossBatch) -> Tensor:
        if "kl" in self.inputs:
            return batch.inputs["kl"].detach().clamp(min=0)
        return batch.logps_N.new_full((batch.num_sequences,), self.kl or 0.0)

    def divisor(self, num_labels: Sequence[int]) -> float:
        """Return the number of data."""
        return float(len(num_labels))
