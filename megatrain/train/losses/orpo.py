"""ORPO: fine-tuning on the chosen answer and an odds ratio against the rejected one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatrain.train.loss import LossBatch, Statistics
from megatrain.train.losses.options import check_number
from megatrain.train.losses.pairs import (
    PAIR_STATISTICS,
    PairLoss,
    Pairs,
    pair_lengths,
    pair_statistics,
    pair_sums,
)
from megatrain.train.losses.sums import measure

_STATISTICS: Sequence[str] = (*PAIR_STATISTICS, "nll_loss", "log_odds_ratio", "log_odds_chosen")


def log1mexp(log_p: Tensor) -> Tensor:
    """Return log(1 - p) from log p <= 0 (Maechler 2012).

    A log p that rounds to 0 is taken as minus the machine's epsilon: its odds stay finite.
    """
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    near = log_p > -0.6931471805599453
    # Each branch sees harmless values where the other is taken: no NaN in its gradient.
    near_value = torch.log(-torch.expm1(torch.where(near, log_p, -1.0)))
    return torch.where(near, near_value, torch.log1p(-torch.where(near, -1.0, log_p).exp()))


def log_odds_ratio(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Return (P,) log of odds(chosen) / odds(rejected), odds = p / (1 - p), from mean log p."""
    return chosen_P - log1mexp(chosen_P) - (rejected_P - log1mexp(rejected_P))


def orpo(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1) -> Tensor:
    """Return (P,) -chosen - beta * log sigmoid(log odds ratio), from mean log p of the answers.

    Hong et al. 2024 (2403.07691), equations 6 and 7; beta is the paper's lambda, as in TRL.
    """
    return -chosen_P - beta * logsigmoid(log_odds_ratio(chosen_P, rejected_P))


@dataclass(frozen=True, kw_only=True)
class ORPOLoss(PairLoss):
    """ORPO, the mean over pairs.  rewards/... and logps/... are means over labels.

    The likelihood term is over the chosen answer's labels; TRL's is over its prompt too.
    """

    beta: float = 0.1

    statistics: ClassVar = _STATISTICS

    def __post_init__(self) -> None:
        """Raise ConfigError unless beta >= 0."""
        check_number("beta", self.beta, at_least=0)

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        means = pair_sums(batch.logps_N, batch) / pair_lengths(batch)
        loss_P = orpo(means.chosen_P, means.rejected_P, beta=self.beta)
        rewards = Pairs(self.beta * means.chosen_P, self.beta * means.rejected_P)
        odds_P = log_odds_ratio(means.chosen_P.detach(), means.rejected_P.detach())
        return loss_P.sum(), {
            **pair_statistics(rewards, means),
            "nll_loss": measure(-means.chosen_P),
            "log_odds_ratio": measure(logsigmoid(odds_P)),
            "log_odds_chosen": measure(odds_P),
        }
