"""Reward models: the chosen answer's score above the rejected one's (Bradley-Terry)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatrain.errors import StateError
from megatrain.train.loss import LossBatch, LossInput, Statistics
from megatrain.train.losses.options import check_number
from megatrain.train.losses.pairs import PairLoss
from megatrain.train.losses.sums import measure, split_pairs

_INPUTS: Mapping[str, LossInput] = {"margin": LossInput(kind="sequence", required=False)}


def bradley_terry(
    chosen_P: Tensor,
    rejected_P: Tensor,
    margin_P: Tensor | float = 0.0,
    *,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """Return (P,) -log sigmoid(chosen - rejected - margin) + c * (chosen + rejected)^2, of scores.

    Ouyang et al. 2022 (2203.02155), equation 1; the margin of Llama 2 (2307.09288), equation 2; the
    regulariser that centres scores at 0 of Eisenstein et al. 2023 (2312.09244), as in TRL.
    """
    loss_P = -logsigmoid(chosen_P - rejected_P - margin_P)
    return loss_P + center_rewards_coefficient * (chosen_P + rejected_P) ** 2


@dataclass(frozen=True, kw_only=True)
class RewardModelLoss(PairLoss):
    """Bradley-Terry on the scores of pairs, the mean over pairs.

    `margin` is a number a datum; a pair's is that of its chosen answer.
    """

    center_rewards_coefficient: float = 0.0

    inputs: ClassVar = _INPUTS
    statistics: ClassVar = ("accuracy", "margin", "mean_reward")
    uses_scores: ClassVar = True

    def __post_init__(self) -> None:
        """Raise ConfigError unless center_rewards_coefficient >= 0."""
        check_number("center_rewards_coefficient", self.center_rewards_coefficient, at_least=0)

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        if batch.scores_S is None:
            raise StateError(
                "RewardModelLoss needs a model with a score head", hint='use task="reward"'
            )
        chosen_P, rejected_P = split_pairs(batch.scores_S)
        margin_P, _ = split_pairs(batch.inputs.get("margin", torch.zeros_like(batch.scores_S)))
        loss_P = bradley_terry(
            chosen_P,
            rejected_P,
            margin_P,
            center_rewards_coefficient=self.center_rewards_coefficient,
        )
        return loss_P.sum(), {
            "accuracy": measure(chosen_P > rejected_P),
            "margin": measure(chosen_P - rejected_P),
            "mean_reward": measure(batch.scores_S),
        }
