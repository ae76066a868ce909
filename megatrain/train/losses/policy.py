"""Policy gradients a label: importance sampling, PPO, CISPO, DRO.

logps_N are those of the policy that is trained, old_logps_N those of the policy that sampled, both
(N,) float32; advantages_N is (N,); ratio = exp(logps - old_logps).  Every function returns a sum
over labels, a scalar, as Tinker defines these losses.  A label whose advantage is 0 has no ratio:
prompts may carry any old_logps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatrain.train.loss import LabelLoss, LossBatch, LossInput, Statistics
from megatrain.train.losses.options import check_number

POLICY_INPUTS: Mapping[str, LossInput] = {"old_logps": LossInput(), "advantages": LossInput()}
CLIPPED_INPUTS: Mapping[str, LossInput] = {
    **POLICY_INPUTS,
    "clip_low_threshold": LossInput(required=False),
    "clip_high_threshold": LossInput(required=False),
}
RATIO_STATISTICS = ("ratio/mean", "approx_kl")
CLIP_STATISTICS = (
    *RATIO_STATISTICS,
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
)


def log_ratio(logps_N: Tensor, old_logps_N: Tensor, advantages_N: Tensor) -> Tensor:
    """Return (N,) logps - old_logps, 0 without gradient where the advantage is 0."""
    return torch.where(advantages_N != 0, logps_N - old_logps_N, 0.0)


def importance_sampling(logps_N: Tensor, old_logps_N: Tensor, advantages_N: Tensor) -> Tensor:
    """Return -sum(ratio * A): the policy gradient, corrected for the policy that sampled (Tinker).

    At old_logps = logps its gradient is REINFORCE's.
    """
    return -(log_ratio(logps_N, old_logps_N, advantages_N).exp() * advantages_N).sum()


def ppo(
    logps_N: Tensor,
    old_logps_N: Tensor,
    advantages_N: Tensor,
    *,
    low: float | Tensor = 0.8,
    high: float | Tensor = 1.2,
) -> Tensor:
    """Return -sum(min(ratio * A, clamp(ratio, low, high) * A)): Schulman et al. 2017, equation 7.

    `low` and `high` bound the ratio itself (PPO's 1 - epsilon and 1 + epsilon); both floats or both
    (N,).
    """
    ratio_N = log_ratio(logps_N, old_logps_N, advantages_N).exp()
    return clipped_surrogate(ratio_N, advantages_N, low, high).sum()


def clipped_surrogate(
    ratio_N: Tensor, advantages_N: Tensor, low: float | Tensor, high: float | Tensor
) -> Tensor:
    """Return (N,) -min(ratio * A, clamp(ratio, low, high) * A)."""
    clipped_N = torch.clamp(ratio_N, low, high)  # type: ignore[arg-type]
    return -torch.min(ratio_N * advantages_N, clipped_N * advantages_N)


def cispo(
    logps_N: Tensor,
    old_logps_N: Tensor,
    advantages_N: Tensor,
    *,
    low: float | Tensor = 0.0,
    high: float | Tensor = 4.0,
) -> Tensor:
    """Return -sum(stop_gradient(clamp(ratio, low, high)) * A * log p): MiniMax-M1 (2506.13585).

    A clipped ratio bounds a label's weight; its gradient stays.
    """
    ratio_N = log_ratio(logps_N, old_logps_N, advantages_N).exp()
    weight_N = torch.clamp(ratio_N, low, high).detach()  # type: ignore[arg-type]
    active_logps_N = torch.where(advantages_N != 0, logps_N, 0.0)
    return -(weight_N * advantages_N * active_logps_N).sum()


def dro(
    logps_N: Tensor, old_logps_N: Tensor, advantages_N: Tensor, *, beta: float = 0.05
) -> Tensor:
    """Return -sum(log p * A - beta / 2 * (log p - old log p)^2): DRO (2405.19107), by label.

    Every label counts in the quadratic term, also with an advantage of 0.
    """
    gap_N = logps_N - old_logps_N
    return -(logps_N * advantages_N - 0.5 * beta * gap_N * gap_N).sum()


def ratio_statistics(log_ratio_N: Tensor, active_N: Tensor) -> Statistics:
    """Return the mean ratio and the KL estimate E[ratio - 1 - log ratio] over active labels.

    The estimator is k3 of Schulman's "Approximating KL Divergence": of KL(old, new), since the old
    policy sampled.
    """
    log_N = log_ratio_N.detach()
    ratio_N, count = log_N.exp(), active_N.sum()
    kl_N = ratio_N - 1 - log_N
    return {
        "ratio/mean": (torch.where(active_N, ratio_N, 0.0).sum(), count),
        "approx_kl": (torch.where(active_N, kl_N, 0.0).sum(), count),
    }


def clip_statistics(low_N: Tensor, high_N: Tensor, count: Tensor | float) -> Statistics:
    """Return the shares of labels (or sequences) clipped below, above and at all, named as TRL's.

    Both are boolean.
    """
    return {
        "clip_ratio/low_mean": (low_N.float().sum(), count),
        "clip_ratio/high_mean": (high_N.float().sum(), count),
        "clip_ratio/region_mean": ((low_N | high_N).float().sum(), count),
    }


@dataclass(frozen=True, kw_only=True)
class ImportanceSamplingLoss(LabelLoss):
    """-ratio * advantage, the mean over labels."""

    inputs: ClassVar = POLICY_INPUTS
    statistics: ClassVar = RATIO_STATISTICS

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        old_N, advantages_N = batch.inputs["old_logps"], batch.inputs["advantages"]
        loss = importance_sampling(batch.logps_N, old_N, advantages_N)
        log_N = log_ratio(batch.logps_N, old_N, advantages_N)
        return loss, ratio_statistics(log_N, advantages_N != 0)


@dataclass(frozen=True, kw_only=True)
class ClippedLoss(LabelLoss):
    """Base of losses with bounds on the ratio: absolute ones, not distances from 1.

    A call may give either bound a datum or a label, under the option's name.
    """

    clip_low_threshold: float = 0.8
    clip_high_threshold: float = 1.2

    inputs: ClassVar = CLIPPED_INPUTS
    statistics: ClassVar = CLIP_STATISTICS

    def __post_init__(self) -> None:
        """Raise ConfigError unless 0 <= clip_low_threshold <= clip_high_threshold."""
        super().__post_init__()
        check_number("clip_low_threshold", self.clip_low_threshold, at_least=0)
        low = self.clip_low_threshold
        check_number("clip_high_threshold", self.clip_high_threshold, at_least=low)

    def bounds(self, batch: LossBatch) -> tuple[Tensor, Tensor]:
        """Return the low and the high bound of every label."""
        low, high = (
            batch.inputs.get(name, torch.full_like(batch.logps_N, getattr(self, name)))
            for name in ("clip_low_threshold", "clip_high_threshold")
        )
        return low.detach(), high.detach()


@dataclass(frozen=True, kw_only=True)
class PPOLoss(ClippedLoss):
    """PPO's clipped surrogate, the mean over labels.  Bounds: 0.8 and 1.2, Tinker's and PPO's."""

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        old_N, advantages_N = batch.inputs["old_logps"], batch.inputs["advantages"]
        low_N, high_N = self.bounds(batch)
        loss = ppo(batch.logps_N, old_N, advantages_N, low=low_N, high=high_N)
        log_N = log_ratio(batch.logps_N, old_N, advantages_N).detach()
        ratio_N, active_N = log_N.exp(), advantages_N != 0
        below_N = (ratio_N < low_N) & (advantages_N < 0)
        above_N = (ratio_N > high_N) & (advantages_N > 0)
        clipped = clip_statistics(below_N, above_N, active_N.sum())
        return loss, {**ratio_statistics(log_N, active_N), **clipped}


@dataclass(frozen=True, kw_only=True)
class CISPOLoss(ClippedLoss):
    """CISPO, the mean over labels.  Bounds: 0 and 4, Tinker's cookbook's."""

    clip_low_threshold: float = 0.0
    clip_high_threshold: float = 4.0

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        old_N, advantages_N = batch.inputs["old_logps"], batch.inputs["advantages"]
        low_N, high_N = self.bounds(batch)
        loss = cispo(batch.logps_N, old_N, advantages_N, low=low_N, high=high_N)
        log_N = log_ratio(batch.logps_N, old_N, advantages_N).detach()
        ratio_N, active_N = log_N.exp(), advantages_N != 0
        below_N, above_N = (ratio_N < low_N) & active_N, (ratio_N > high_N) & active_N
        clipped = clip_statistics(below_N, above_N, active_N.sum())
        return loss, {**ratio_statistics(log_N, active_N), **clipped}


@dataclass(frozen=True, kw_only=True)
class DROLoss(LabelLoss):
    """DRO by label, the mean over labels.  beta: 0.05, the example of Tinker's documentation."""

    beta: float = 0.05

    inputs: ClassVar = POLICY_INPUTS
    statistics: ClassVar = RATIO_STATISTICS

    def __post_init__(self) -> None:
        """Raise ConfigError unless beta >= 0."""
        super().__post_init__()
        check_number("beta", self.beta, at_least=0)

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        old_N, advantages_N = batch.inputs["old_logps"], batch.inputs["advantages"]
        loss = dro(batch.logps_N, old_N, advantages_N, beta=self.beta)
        log_N = log_ratio(batch.logps_N, old_N, advantages_N)
        return loss, ratio_statistics(log_N, advantages_N != 0)
