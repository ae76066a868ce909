"""MPO: preference (DPO), quality of each answer (BCO) and generation (likelihood) in one loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from megatrain.errors import ConfigError
from megatrain.train.loss import LossBatch, LossInput, Statistics
from megatrain.train.losses.options import check_number
from megatrain.train.losses.pairs import PairLoss, Pairs, pair_lengths, pair_statistics, pair_sums

_INPUTS: Mapping[str, LossInput] = {"ref_logps": LossInput()}


def mpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    chosen_mean_P: Tensor,
    *,
    preference_weight: float = 0.8,
    quality_weight: float = 0.2,
    generation_weight: float = 1.0,
    reward_shift: float = 0.0,
) -> Tensor:
    """Return (P,) the weighted sum of three losses of each pair.

    `chosen_P` and `rejected_P` are rewards, beta * log(policy / reference), from sums over labels;
    `chosen_mean_P` is the mean log p of the chosen answer's labels.  Wang et al. 2024
    (2411.10442), equations 2 to 6; TRL's loss_type ["sigmoid", "bco_pair", "sft"].
    """
    preference_P = -logsigmoid(chosen_P - rejected_P)
    quality_P = -logsigmoid(chosen_P - reward_shift) - logsigmoid(reward_shift - rejected_P)
    weighted_P = preference_weight * preference_P + quality_weight * quality_P
    return weighted_P - generation_weight * chosen_mean_P


@dataclass(frozen=True, kw_only=True)
class MPOLoss(PairLoss):
    """MPO on pairs, the mean over pairs; calls give `ref_logps`."""

    beta: float = 0.1
    preference_weight: float = 0.8
    quality_weight: float = 0.2
    generation_weight: float = 1.0
    reward_shift: float = 0.0
    """BCO's delta, from which an answer's reward counts as good.  The paper moves it along with
    the mean reward; here it is a constant, as in TRL, whose value is 0."""

    inputs: ClassVar = _INPUTS

    def __post_init__(self) -> None:
        """Raise ConfigError where an option is out of range."""
        check_number("beta", self.beta, above=0)
        weights = ("preference_weight", "quality_weight", "generation_weight")
        for name in weights:
            check_number(name, getattr(self, name), at_least=0)
        if not any(getattr(self, name) for name in weights):
            raise ConfigError(f"one of {', '.join(weights)} must be above 0")
        check_number("reward_shift", self.reward_shift)

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        logps = pair_sums(batch.logps_N, batch)
        ratios = pair_sums(batch.logps_N - batch.inputs["ref_logps"], batch)
        rewards = Pairs(self.beta * ratios.chosen_P, self.beta * ratios.rejected_P)
        loss_P = mpo(
            rewards.chosen_P,
            rewards.rejected_P,
            (logps / pair_lengths(batch)).chosen_P,
            preference_weight=self.preference_weight,
            quality_weight=self.quality_weight,
            generation_weight=self.generation_weight,
            reward_shift=self.reward_shift,
        )
        return loss_P.sum(), pair_statistics(rewards, logps)
