"""SimPO: preference without a reference, on the mean log-probability of an answer's labels."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from megatrain.train.loss import LossBatch, Statistics
from megatrain.train.losses.options import check_number
from megatrain.train.losses.pairs import PairLoss, Pairs, pair_lengths, pair_statistics, pair_sums


def simpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return (P,) -log sigmoid(beta * (chosen - rejected) - gamma), from mean log p of the answers.

    Meng et al. 2024 (2405.14734), equation 6; label smoothing as in TRL.
    """
    margin_P = beta * (chosen_P - rejected_P) - gamma
    right_P, wrong_P = logsigmoid(margin_P), logsigmoid(-margin_P)
    return -(1 - label_smoothing) * right_P - label_smoothing * wrong_P


@dataclass(frozen=True, kw_only=True)
class SimPOLoss(PairLoss):
    """SimPO, the mean over pairs.  rewards/... and logps/... are means over labels."""

    beta: float = 2.0
    gamma: float = 1.0
    """Margin by which the chosen answer's reward shall be higher."""
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Raise ConfigError where an option is out of range."""
        check_number("beta", self.beta, above=0)
        check_number("gamma", self.gamma, at_least=0)
        check_number("label_smoothing", self.label_smoothing, at_least=0, below=0.5)

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        means = pair_sums(batch.logps_N, batch) / pair_lengths(batch)
        loss_P = simpo(
            means.chosen_P,
            means.rejected_P,
            beta=self.beta,
            gamma=self.gamma,
            label_smoothing=self.label_smoothing,
        )
        rewards = Pairs(self.beta * means.chosen_P, self.beta * means.rejected_P)
        return loss_P.sum(), pair_statistics(rewards, means)
