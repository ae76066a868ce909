"""DPO and the losses of its family, on log-ratios of policy and reference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.errors import ConfigError
from megatrain.train.loss import LossBatch, LossInput, Statistics
from megatrain.train.losses.options import check_choice, check_number, check_switch
from megatrain.train.losses.pairs import PairLoss, Pairs, pair_lengths, pair_statistics, pair_sums

SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair")
"""Loss types with label smoothing."""
AVERAGED = ("ipo", "sigmoid_norm")
"""Loss types on the mean log-ratio a label instead of the sum."""


def _sigmoid(chosen_P: Tensor, rejected_P: Tensor, beta: float, smoothing: float) -> Tensor:
    margin_P = beta * (chosen_P - rejected_P)
    return -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)


def _robust(chosen_P: Tensor, rejected_P: Tensor, beta: float, smoothing: float) -> Tensor:
    margin_P = beta * (chosen_P - rejected_P)
    kept_P, flipped_P = -F.logsigmoid(margin_P), -F.logsigmoid(-margin_P)
    return ((1 - smoothing) * kept_P - smoothing * flipped_P) / (1 - 2 * smoothing)


def _hinge(chosen_P: Tensor, rejected_P: Tensor, beta: float, _: float) -> Tensor:
    return torch.relu(1 - beta * (chosen_P - rejected_P))


def _ipo(chosen_P: Tensor, rejected_P: Tensor, beta: float, _: float) -> Tensor:
    return (chosen_P - rejected_P - 1 / (2 * beta)) ** 2


def _exo_pair(chosen_P: Tensor, rejected_P: Tensor, beta: float, smoothing: float) -> Tensor:
    margin_P = beta * (chosen_P - rejected_P)
    smooth_P = torch.full_like(margin_P, smoothing)
    chosen_kl_P = margin_P.sigmoid() * (F.logsigmoid(margin_P) - torch.log1p(-smooth_P))
    return chosen_kl_P + (-margin_P).sigmoid() * (F.logsigmoid(-margin_P) - smooth_P.log())


def _nca_pair(chosen_P: Tensor, rejected_P: Tensor, beta: float, _: float) -> Tensor:
    chosen_P, rejected_P = beta * chosen_P, beta * rejected_P
    away_P = F.logsigmoid(-chosen_P) + F.logsigmoid(-rejected_P)
    return -F.logsigmoid(chosen_P) - 0.5 * away_P


def _bco_pair(chosen_P: Tensor, rejected_P: Tensor, beta: float, _: float) -> Tensor:
    return -F.logsigmoid(beta * chosen_P) - F.logsigmoid(-beta * rejected_P)


def _sppo_hard(chosen_P: Tensor, rejected_P: Tensor, beta: float, _: float) -> Tensor:
    return (chosen_P - 0.5 / beta) ** 2 + (rejected_P + 0.5 / beta) ** 2


def _apo_zero(chosen_P: Tensor, rejected_P: Tensor, beta: float, _: float) -> Tensor:
    return (-beta * chosen_P).sigmoid() + (beta * rejected_P).sigmoid()


def _apo_down(chosen_P: Tensor, rejected_P: Tensor, beta: float, _: float) -> Tensor:
    return (beta * chosen_P).sigmoid() + (-beta * (chosen_P - rejected_P)).sigmoid()


LOSS_TYPES: Mapping[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid,
    "ipo": _ipo,
    "hinge": _hinge,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
"""TRL's names, those whose loss of a pair needs no other pair."""


def dpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return (P,) the loss of each pair from log(policy / reference) of its answers, both (P,).

    The log-ratio is a sum over labels; for ipo and sigmoid_norm their mean.  By loss type:

    - sigmoid: DPO, Rafailov et al. 2023 (2305.18290), equation 7; with smoothing "conservative
      DPO" (Mitchell 2023).  sigmoid_norm: the same on means (length-normalised, Tulu 3).
    - ipo: Azar et al. 2023 (2310.12036), equation 17; beta is tau.  Means, as its authors use.
    - hinge: SLiC-HF (2305.10425), on DPO's margin.  robust: rDPO (2403.00409).
    - exo_pair: EXO (2402.00856), equation 16.  nca_pair: NCA (2402.05369).
    - bco_pair: BCO (2404.04656), with a reward shift of 0.  sppo_hard: SPPO (2405.00675).
    - apo_zero, apo_down: APO (2408.06266), equations 7 and 8.
    """
    return LOSS_TYPES[loss_type](chosen_P, rejected_P, beta, label_smoothing)


@dataclass(frozen=True, kw_only=True)
class DPOLoss(PairLoss):
    """DPO and its family on pairs; calls give `ref_logps`, log p of every label by the reference.

    The mean over pairs.
    """

    beta: float = 0.1
    """How much a reward weighs against distance from the reference (tau for ipo)."""
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round, below one half."""
    reference_free: bool = False
    """The reference gives every answer the same probability: no `ref_logps`."""
    sft_weight: float = 0.0
    """Adds this times the mean -log p of the chosen answer's labels (Pang et al. 2024,
    2404.19733, equation 2)."""

    def __post_init__(self) -> None:
        """Raise ConfigError where an option is out of range or without effect."""
        check_number("beta", self.beta, above=0)
        check_choice("loss_type", self.loss_type, tuple(LOSS_TYPES))
        check_number("label_smoothing", self.label_smoothing, at_least=0, below=0.5)
        check_switch("reference_free", self.reference_free)
        check_number("sft_weight", self.sft_weight, at_least=0)
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            raise ConfigError(
                f"loss_type={self.loss_type!r} has no label smoothing: {self.label_smoothing}",
                hint=f"it is for {', '.join(SMOOTHED)}",
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ConfigError(
                "loss_type='exo_pair' needs label_smoothing above 0: its target has a logarithm"
            )

    @property
    def inputs(self) -> Mapping[str, LossInput]:  # type: ignore[override]
        """ref_logps, unless reference-free."""
        return {} if self.reference_free else {"ref_logps": LossInput()}

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        logps, lengths = pair_sums(batch.logps_N, batch), pair_lengths(batch)
        ratio_N = batch.logps_N
        if not self.reference_free:
            ratio_N = ratio_N - batch.inputs["ref_logps"]
        ratios = pair_sums(ratio_N, batch)
        scores = ratios / lengths if self.loss_type in AVERAGED else ratios
        loss_P = dpo(
            scores.chosen_P,
            scores.rejected_P,
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
        )
        if self.sft_weight:
            loss_P = loss_P - self.sft_weight * (logps / lengths).chosen_P
        rewards = Pairs(self.beta * ratios.chosen_P, self.beta * ratios.rejected_P)
        return loss_P.sum(), pair_statistics(rewards, logps)
