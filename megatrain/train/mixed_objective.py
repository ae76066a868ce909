"""The losses of several adapters on one micro-batch: each sees its own labels alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatrain.model.microbatch import MicroBatch
from megatrain.parallel.groups import Groups
from megatrain.train.loss import Loss
from megatrain.train.objective import Objective


class MixedObjective:
    """As Objective, for micro-batches of a MixedPlan; `each` is in the order of its shares."""

    def __init__(self, losses: Sequence[Loss], groups: Groups) -> None:
        self.each = [Objective(loss, groups) for loss in losses]

    @property
    def sizes(self) -> list[int]:
        """How many of the totals are each adapter's."""
        return [1 + 2 * len(objective.names) for objective in self.each]

    def __call__(self, rows_RN: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return a scalar with the gradient of all losses' sums, and totals side by side.

        Collective over CP.
        """
        surrogate, totals = rows_RN.sum() * 0.0, []
        parts = zip(self.each, self.sizes, _parts(rows_RN, batch), strict=True)
        for objective, size, (rows, part) in parts:
            if not part.labels.num_sequences:
                totals.append(rows_RN.new_zeros(size, dtype=torch.float64))
                continue
            value, total = objective(rows, part)
            surrogate = surrogate + value
            totals.append(total)
        return surrogate, torch.cat(totals)


def _parts(rows_RN: Tensor, batch: MicroBatch) -> Iterator[tuple[Tensor, MicroBatch]]:
    """Yield each adapter's rows, and the micro-batch as if it were alone in it."""
    mixture = batch.mixture
    assert mixture is not None
    start = place = 0
    for count, labels in zip(mixture.label_counts, batch.parts, strict=True):
        stop = start + count
        real = batch.has_labels and count > 0
        part = replace(
            batch,
            places_N=batch.places_N[start:stop] - place,
            has_labels=real,
            labels=labels,
            mixture=None,
            parts=(),
        )
        yield rows_RN[:, start:stop], part
        start, place = stop, place + len(labels.sequence_M)
