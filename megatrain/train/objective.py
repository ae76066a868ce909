"""A loss on one micro-batch: labels of all CP ranks brought together, sums counted once."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.errors import ConfigError
from megatrain.model.microbatch import MicroBatch
from megatrain.parallel.groups import Groups
from megatrain.train.loss import Loss, LossBatch, Statistics

TOKEN_ACCURACY = "token_accuracy"
"""Share of labels that no other token is likelier than."""


class Objective:
    """What the last pipeline stage computes from the head's output.

    Each CP rank computes the loss of whole sequences from all log-probabilities, of which only its
    own have a gradient, so the sum of gradients over CP ranks is the gradient, and no backward
    communication is needed.
    """

    def __init__(self, loss: Loss, groups: Groups) -> None:
        self.loss, self.groups = loss, groups
        self.names = [*loss.statistics] if loss.uses_scores else [TOKEN_ACCURACY, *loss.statistics]
        self.failure: Exception | None = None
        """What the loss raised.  It is raised after the pass: other ranks wait in the pipeline."""

    def __call__(self, rows_RN: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return a scalar with the gradient of the loss's sum, and totals to be summed over ranks.

        Totals, (1 + 2 * names,) float64, are the loss, then a sum for each name, then a count for
        each.  They are 0 on all CP and TP ranks but the first.  Collective over CP.
        """
        nothing = rows_RN.new_zeros(1 + 2 * len(self.names), dtype=torch.float64)
        needs_grad = rows_RN.requires_grad
        rows = rows_RN.detach().requires_grad_(needs_grad)
        rows_RM = _whole(rows, batch, self.groups.collection.cp)
        if not batch.labels.num_sequences or self.failure is not None:
            return rows_RN.sum() * 0.0, nothing
        try:
            value, statistics = self.loss(self._loss_batch(rows_RM, batch))
            totals = self._totals(value, statistics, rows_RM.detach())
            # What the pipeline gets is linear, so that a user's backward cannot fail inside it.
            surrogate = rows_RN.sum() * 0.0
            if needs_grad and rows_RM.shape[1]:
                surrogate = (rows_RN * _gradient(value, rows, self.loss)).sum()
        except Exception as error:  # noqa: BLE001 - a user's code; see `failure`
            self.failure = error
            return rows_RN.sum() * 0.0, nothing
        is_first = self.groups.collection.cp.rank() == 0 and self.groups.tp.rank() == 0
        return surrogate, totals if is_first else nothing

    def _totals(self, value: Tensor, statistics: Statistics, rows_RM: Tensor) -> Tensor:
        if value.dim():
            raise ConfigError(
                f"{type(self.loss).__name__} must return a scalar: got shape {tuple(value.shape)}",
                hint="return the sum over labels; the division comes at the optimizer step",
            )
        found = dict(statistics)
        if not self.loss.uses_scores:
            found[TOKEN_ACCURACY] = (rows_RM[1].sum(), rows_RM.shape[1])
        if found.keys() != set(self.names):
            raise ConfigError(
                f"{type(self.loss).__name__} must report what its `statistics` names, "
                f"{sorted(self.loss.statistics)}: got {sorted(statistics)}"
            )
        sums = [found[name][0] for name in self.names]
        counts = [found[name][1] for name in self.names]
        return torch.stack([_number(each, rows_RM) for each in (value, *sums, *counts)])

    def _loss_batch(self, rows_RM: Tensor, batch: MicroBatch) -> LossBatch:
        labels = batch.labels
        scores = rows_RM[0] if self.loss.uses_scores else None
        return LossBatch(
            logps_N=rows_RM.new_zeros(0) if self.loss.uses_scores else rows_RM[0],
            sequence_N=labels.sequence_M,
            num_sequences=labels.num_sequences,
            inputs=labels.inputs,
            top_logps_NK=rows_RM[2:].T if len(rows_RM) > 2 else None,
            scores_S=scores,
        )

    def summary(self, totals: Sequence[float]) -> tuple[float, dict[str, tuple[float, float]]]:
        """Return the loss's sum and (sum, count) by name from totals over all ranks."""
        size = len(self.names)
        pairs = zip(totals[1 : 1 + size], totals[1 + size :], strict=True)
        return totals[0], dict(zip(self.names, pairs, strict=True))


def _gradient(value: Tensor, rows_RN: Tensor, loss: Loss) -> Tensor:
    """Return d value / d rows.  Raises ConfigError for a value that does not depend on them."""
    if not value.requires_grad:
        raise ConfigError(
            f"{type(loss).__name__} returned a number without gradient",
            hint="compute it from the batch's log-probabilities, without detach() or item()",
        )
    (gradient,) = torch.autograd.grad(value, rows_RN)
    return gradient


def _number(value: Tensor | float, like: Tensor) -> Tensor:
    """Return a float64 scalar without gradient on the device of `like`: no wait for a GPU."""
    return torch.as_tensor(value, device=like.device).detach().to(torch.float64).reshape(())


class ScoresOnly(Loss):
    """No loss: the scores of data that are no pairs."""

    uses_scores = True

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        assert batch.scores_S is not None
        return batch.scores_S.sum() * 0.0, {}

    def divisor(self, num_labels: Sequence[int]) -> float:
        """Return 0: there is nothing to divide."""
        return 0.0


def _whole(rows_RN: Tensor, batch: MicroBatch, group: dist.ProcessGroup) -> Tensor:
    """Return all M labels' columns in the order of the data.  Collective over `group`."""
    size = rows_RN.shape[1] if batch.has_labels else 0
    own, where = rows_RN[:, :size], batch.places_N[:size]
    if group.size() == 1:
        return own
    everyone = rows_RN.new_zeros(len(rows_RN), len(batch.labels.sequence_M))
    everyone.index_copy_(1, where, own.detach())
    dist.all_reduce(everyone, group=group)
    return everyone.index_copy(1, where, own)
