"""GSPO: PPO whose ratio is a sequence's, with the gradient of each label (GSPO-token)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatrain.train.loss import LossBatch, LossInput, Statistics
from megatrain.train.losses.policy import (
    CLIPPED_INPUTS,
    ClippedLoss,
    clip_statistics,
    clipped_surrogate,
    log_ratio,
    ratio_statistics,
)
from megatrain.train.losses.sums import label_counts, sequence_sums

_INPUTS: Mapping[str, LossInput] = {
    **CLIPPED_INPUTS,
    "sequence_ratio_mask": LossInput(required=False),
}


def mean_log_ratio(log_ratio_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Return (S,) the mean of log_ratio_N over the labels of a sequence."""
    counts_S = label_counts(sequence_N, num_sequences)
    return sequence_sums(log_ratio_N, sequence_N, num_sequences) / counts_S


def gspo(
    logps_N: Tensor,
    sequence_log_ratio_N: Tensor,
    advantages_N: Tensor,
    *,
    low: float | Tensor,
    high: float | Tensor,
) -> Tensor:
    """Return -sum(min(r * A, clamp(r, low, high) * A)), r = exp(s + log p - stop_gradient(log p)).

    s is (N,), the mean of log p - old log p over a label's sequence, without gradient: its value
    is the whole sequence's ratio, its gradient each label's own.  GSPO-token of Zheng et al. 2025
    (2507.18071), equations 13 and 14, as Tinker computes it.  Shapes (N,); bounds both floats or
    both (N,).
    """
    own_N = torch.where(advantages_N != 0, logps_N - logps_N.detach(), 0.0)
    log_N = torch.where(advantages_N != 0, sequence_log_ratio_N.detach(), 0.0) + own_N
    return clipped_surrogate(log_N.exp(), advantages_N, low, high).sum()


@dataclass(frozen=True, kw_only=True)
class GSPOLoss(ClippedLoss):
    """GSPO-token, the mean over labels.  Bounds: the paper's 1 - 3e-4 and 1 + 4e-4.

    A sequence's ratio is over its labels, or over those whose `sequence_ratio_mask` is not 0.
    """

    clip_low_threshold: float = 1 - 3e-4
    clip_high_threshold: float = 1 + 4e-4

    inputs: ClassVar = _INPUTS
    by_sequence: ClassVar = True

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        logps_N, advantages_N = batch.logps_N, batch.inputs["advantages"]
        gap_N = log_ratio(logps_N, batch.inputs["old_logps"], advantages_N)
        log_N = self._sequence_log_ratio(batch)
        low_N, high_N = self.bounds(batch)
        loss = gspo(logps_N, log_N, advantages_N, low=low_N, high=high_N)
        active_N = advantages_N != 0
        below_N = (log_N.exp() < low_N) & (advantages_N < 0)
        above_N = (log_N.exp() > high_N) & (advantages_N > 0)
        clipped = clip_statistics(below_N, above_N, active_N.sum())
        return loss, {**ratio_statistics(gap_N, active_N), **clipped}

    def _sequence_log_ratio(self, batch: LossBatch) -> Tensor:
        gap_N = batch.logps_N - batch.inputs["old_logps"]
        mask_N = batch.inputs.get("sequence_ratio_mask")
        counted_N = torch.ones_like(gap_N, dtype=torch.bool) if mask_N is None else mask_N != 0
        mean_S = mean_log_ratio(gap_N[counted_N], batch.sequence_N[counted_N], batch.num_sequences)
        return mean_S[batch.sequence_N]
