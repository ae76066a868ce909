"""GRPO and what came of it: DAPO's and Dr. GRPO's averages, dual clip, a ratio a sequence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.errors import ConfigError
from megatrain.train.loss import Loss, LossBatch, LossInput, Statistics
from megatrain.train.losses.gspo import mean_log_ratio
from megatrain.train.losses.options import check_choice, check_number
from megatrain.train.losses.policy import CLIP_STATISTICS, clip_statistics, ratio_statistics
from megatrain.train.losses.sums import label_counts

LOSS_TYPES = ("dapo", "bnpo", "grpo", "dr_grpo")
LEVELS = ("token", "sequence")


def grpo(
    log_ratio_N: Tensor,
    advantages_N: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """Return (N,) -min(min(r, delta) * A, clamp(r, 1 - epsilon, 1 + epsilon_high) * A).

    r = exp(log_ratio_N) is a label's ratio of new to old policy, or its sequence's.  Shao et al.
    2024 (2402.03300), equation 3 without its KL term; `epsilon_high` as in DAPO (2503.14476);
    `delta` bounds the loss where A < 0, the dual clip of Ye et al. 2020 (1912.09729); all as in
    TRL.  Without advantage a label has no surrogate, however far its ratio is.
    """
    ratio_N = torch.where(advantages_N != 0, log_ratio_N, 0.0).exp()
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    clipped_N = torch.clamp(ratio_N, 1 - epsilon, high)
    bounded_N = ratio_N if delta is None else torch.clamp(ratio_N, max=delta)
    return -torch.min(bounded_N * advantages_N, clipped_N * advantages_N)


def reference_kl(logps_N: Tensor, ref_logps_N: Tensor) -> Tensor:
    """Return (N,) exp(ref - log p) - (ref - log p) - 1: GRPO's estimate of KL(policy, reference).

    Schulman's k3: unbiased where the policy itself sampled, and never negative.
    """
    gap_N = ref_logps_N - logps_N
    return gap_N.exp() - gap_N - 1


@dataclass(frozen=True, kw_only=True)
class GRPOLoss(Loss):
    """GRPO on `advantages`, one a datum or one a label.

    Without `old_logps` the data count as sampled from the policy that is trained: a ratio of 1,
    with gradient.
    """

    epsilon: float = 0.2
    """The ratio is clipped below 1 - epsilon ..."""
    epsilon_high: float | None = None
    """... and above 1 + epsilon_high (epsilon if None)."""
    delta: float | None = None
    """Upper bound of the ratio where the advantage is negative; above 1 + epsilon_high."""
    beta: float = 0.0
    """Weight of the KL term; with one, calls give `ref_logps`."""
    loss_type: str = "dapo"
    """What is averaged over the global batch.  dapo, bnpo: labels (they differ in TRL, which also
    knows local batches).  grpo: labels of a sequence, then sequences.  dr_grpo: labels, over
    sequences * max_completion_length."""
    max_completion_length: int | None = None
    """For dr_grpo."""
    importance_sampling_level: str = "token"
    """token: a ratio a label.  sequence: exp of the mean log ratio of a sequence (GSPO)."""

    def __post_init__(self) -> None:
        """Raise ConfigError where an option is out of range or without effect."""
        check_number("epsilon", self.epsilon, at_least=0, at_most=1)
        if self.epsilon_high is not None:
            check_number("epsilon_high", self.epsilon_high, at_least=0)
        if self.delta is not None:
            check_number("delta", self.delta, above=self._high)
        check_number("beta", self.beta, at_least=0)
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, LEVELS)
        if (self.loss_type == "dr_grpo") != (self.max_completion_length is not None):
            raise ConfigError(
                "loss_type='dr_grpo' and max_completion_length go together: "
                f"{self.loss_type!r}, {self.max_completion_length}"
            )
        if self.max_completion_length is not None:
            check_number("max_completion_length", self.max_completion_length, at_least=1)

    @property
    def _high(self) -> float:
        return 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)

    @property
    def inputs(self) -> Mapping[str, LossInput]:  # type: ignore[override]
        """advantages; old_logps if off-policy; ref_logps with a KL term."""
        needed = {"advantages": LossInput(), "old_logps": LossInput(required=False)}
        return {**needed, "ref_logps": LossInput()} if self.beta else needed

    @property
    def by_sequence(self) -> bool:  # type: ignore[override]
        """A ratio or an average a sequence; the mean over labels asks for neither."""
        labels_alone = self.loss_type in ("dapo", "bnpo")
        return not labels_alone or self.importance_sampling_level == "sequence"

    @property
    def statistics(self) -> Sequence[str]:  # type: ignore[override]
        """Clip shares, ratio, KL to the old policy; kl to the reference with a KL term."""
        return (*CLIP_STATISTICS, "kl") if self.beta else CLIP_STATISTICS

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        logps_N, advantages_N = batch.logps_N, batch.inputs["advantages"]
        gap_N = logps_N - batch.inputs.get("old_logps", logps_N.detach())
        log_N = gap_N
        if self.importance_sampling_level == "sequence":
            log_N = mean_log_ratio(gap_N, batch.sequence_N, batch.num_sequences)[batch.sequence_N]
        loss_N = grpo(
            log_N,
            advantages_N,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
        )
        statistics = {
            **ratio_statistics(torch.where(advantages_N != 0, gap_N, 0.0), advantages_N != 0),
            **self._clip_statistics(log_N.detach().exp(), advantages_N),
        }
        if self.beta:
            kl_N = reference_kl(logps_N, batch.inputs["ref_logps"])
            loss_N = loss_N + self.beta * kl_N
            statistics["kl"] = (kl_N.detach().sum(), float(kl_N.numel()))
        if self.loss_type == "grpo":
            loss_N = loss_N / label_counts(batch.sequence_N, batch.num_sequences)[batch.sequence_N]
        return loss_N.sum(), statistics

    def _clip_statistics(self, ratio_N: Tensor, advantages_N: Tensor) -> Statistics:
        below_N = (ratio_N < 1 - self.epsilon) & (advantages_N < 0)
        above_N = (ratio_N > self._high) & (advantages_N > 0)
        return clip_statistics(below_N, above_N, float(ratio_N.numel()))

    def divisor(self, num_labels: Sequence[int]) -> float:
        """Return labels, sequences, or sequences * max_completion_length, as loss_type says."""
        if self.loss_type == "grpo":
            return float(len(num_labels))
        if self.max_completion_length is not None:
            return float(len(num_labels) * self.max_completion_length)
        return super().divisor(num_labels)
