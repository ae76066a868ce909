"""Cross-entropy on labels: fine-tuning and pretraining."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatrain.train.loss import LabelLoss, LossBatch, LossInput, Statistics


def cross_entropy(logps_N: Tensor, weights_N: Tensor) -> Tensor:
    """Return the sum of -weight * log p, a scalar: Tinker's cross_entropy.

    With weights of 1 the negative log-likelihood, as torch.nn.functional.cross_entropy with
    reduction="sum" has it of logits.  Both (N,) float32.  Weights may have any sign and size; a
    label of weight 0 takes no part, whatever its log-probability is.
    """
    return -torch.where(weights_N != 0, logps_N * weights_N, 0.0).sum()


@dataclass(frozen=True, kw_only=True)
class CrossEntropyLoss(LabelLoss):
    """-log p of every label, times its weight if `weights` are given; the mean over labels.

    The mean divides by the number of labels whatever the weights are, so that a gradient
    -dC/dlogp of any C may be given as weights, as Tinker's forward_backward_custom does.
    """

    inputs: ClassVar = {"weights": LossInput(required=False)}

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        weights_N = batch.inputs.get("weights")
        if weights_N is None:
            weights_N = torch.ones_like(batch.logps_N)
        return cross_entropy(batch.logps_N, weights_N), {}
