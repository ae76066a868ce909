"""Results of all ranks, on all ranks: values in request order, sums over the global batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.errors import NonFiniteError, StateError
from megatrain.model.microbatch import MicroBatch
from megatrain.parallel import phase
from megatrain.train.batch import BatchPlan
from megatrain.train.loss import Loss
from megatrain.train.objective import Objective
from megatrain.types import StepOutput


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """A batch that is checked, planned and packed, and what its loss is divided by."""

    plan: BatchPlan
    batches: list[MicroBatch]
    loss: Loss
    divisor: float


def collect(
    packed: PackedPlan,
    rows: Sequence[Tensor],
    totals: Sequence[Tensor],
    objective: Objective,
) -> StepOutput | Exception:
    """Return the result of a pass on every rank, or the error that each is to raise.

    `rows` and `totals` are what Network.run returned.  Collective over all ranks.
    """
    phase.enter(phase.GATHERING)
    plan, groups = packed.plan, packed.plan.groups
    mine = torch.zeros(2 + 2 * len(objective.names), dtype=torch.float64, device=groups.device)
    for each in totals:
        mine[:-1] += each
    if groups.is_last_stage and groups.tp.rank() == 0 and groups.collection.cp.rank() == 0:
        mine[-1] = sum(batch.squares for batch in packed.batches)
    if objective.failure is not None:
        status = _FAILED
    else:
        status = 0.0 if bool(torch.isfinite(mine[0])) else _NOT_FINITE
    flat = _gather(plan, packed.batches, rows, status)
    if isinstance(flat, Exception):
        return objective.failure or flat
    dist.all_reduce(mine)
    *sums, squares = mine.tolist()
    loss_sum, statistics = objective.summary(sums)
    values = flat.cpu().numpy()
    return StepOutput(
        loss=loss_sum / packed.divisor if packed.divisor else 0.0,
        logps=[values[datum.start : datum.start + datum.size] for datum in plan.data],
        num_tokens=plan.num_labels,
        divisor=packed.divisor,
        statistics={name: s / c for name, (s, c) in statistics.items() if c},
        counts={name: c for name, (_, c) in statistics.items() if c},
        squares=squares,
    )


_NOT_FINITE, _FAILED = 1.0, 2.0
"""What a rank has to say of its part."""


def _gather(
    plan: BatchPlan, batches: Sequence[MicroBatch], rows: Sequence[Tensor], status: float
) -> Tensor | Exception:
    """Return all labels' first row in request order, float32, on every rank.  Collective.

    The first TP rank of each last stage writes what it has; a sum over ranks puts it together
    (every slot has one writer, so the sum is exact).  The tail holds one status a rank.
    """
    groups = plan.groups
    flat = torch.zeros(plan.num_slots + groups.mesh.world_size, device=groups.device)
    if groups.is_last_stage and groups.tp.rank() == 0:
        for batch, values in zip(batches, rows, strict=True):
            real = batch.slots_N >= 0
            flat[batch.slots_N[real]] = values[0, real]
        if not bool(torch.isfinite(flat).all()):
            status = max(status, _NOT_FINITE)
        flat.nan_to_num_(0.0, 0.0, 0.0)
    flat[plan.num_slots + groups.rank] = status
    dist.all_reduce(flat)
    tail = flat[plan.num_slots :]
    failed = (tail == _FAILED).nonzero().flatten().tolist()
    if failed:
        return StateError(f"the loss failed on rank(s) {failed}; the gradients are as before")
    wrong = tail.nonzero().flatten().tolist()
    if wrong:
        return NonFiniteError(
            f"a log-probability or the loss is not a finite number on rank(s) {wrong}",
            hint="look at the learning rate and the data; the gradients are as before this call",
        )
    return flat[: plan.num_slots]
