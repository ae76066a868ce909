"""Results of a pass of several adapters, on all ranks: each adapter's own, or its error."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.errors import MegatrainError, NonFiniteError, StateError
from megatrain.model.microbatch import MicroBatch
from megatrain.parallel import phase
from megatrain.train.mixed_objective import MixedObjective
from megatrain.train.mixed_plan import MixedPlan, Share
from megatrain.train.objective import Objective
from megatrain.types import FloatArray, StepOutput

Results = dict[str, StepOutput | MegatrainError]
"""By adapter."""

_NOT_FINITE, _FAILED = 1.0, 1e6
"""What ranks add up of an adapter; there are fewer than a million of them."""


def collect_mixed(
    plan: MixedPlan,
    batches: Sequence[MicroBatch],
    rows: Sequence[Tensor],
    totals: Sequence[Tensor],
    objective: MixedObjective,
) -> Results:
    """Return each adapter's result, on every rank.  Collective over all ranks."""
    phase.enter(phase.GATHERING)
    sums = _sums(plan, batches, totals, objective)
    flat = _flat(plan, batches, rows)
    sizes = [sum(datum.size for datum in share.data) for share in plan.shares]
    values = flat[: plan.num_slots].split(sizes)
    own = sums[: sum(objective.sizes)].split(objective.sizes)
    for number, each in enumerate(objective.each):
        is_finite = torch.isfinite(values[number]).all() and torch.isfinite(own[number]).all()
        status = _FAILED if each.failure is not None else _NOT_FINITE * (not bool(is_finite))
        flat[plan.num_slots + number] = status
    for tensor in (flat, sums):
        tensor.nan_to_num_(0.0, 0.0, 0.0)
        dist.all_reduce(tensor)
    return _results(plan, flat.cpu().numpy(), sums.tolist(), objective)


def _sums(
    plan: MixedPlan,
    batches: Sequence[MicroBatch],
    totals: Sequence[Tensor],
    objective: MixedObjective,
) -> Tensor:
    """Return this rank's totals of all adapters, then the squared lengths of each."""
    groups, size = plan.groups, sum(objective.sizes)
    sums = torch.zeros(size + len(plan.shares), dtype=torch.float64, device=groups.device)
    for each in totals:
        sums[:size] += each
    if groups.is_last_stage and groups.tp.rank() == 0 and groups.collection.cp.rank() == 0:
        for batch in batches:
            assert batch.mixture is not None
            sums[size:] += torch.tensor(batch.mixture.squares).to(sums)
    return sums


def _flat(plan: MixedPlan, batches: Sequence[MicroBatch], rows: Sequence[Tensor]) -> Tensor:
    """Return this rank's log-probabilities in request order, and room for a status an adapter."""
    groups = plan.groups
    flat = torch.zeros(plan.num_slots + len(plan.shares), device=groups.device)
    if groups.is_last_stage and groups.tp.rank() == 0:
        for batch, values in zip(batches, rows, strict=True):
            real = batch.slots_N >= 0
            flat[batch.slots_N[real]] = values[0, real]
    return flat


def _results(
    plan: MixedPlan, flat: FloatArray, sums: list[float], objective: MixedObjective
) -> Results:
    results: Results = {}
    place, squares = 0, sums[sum(objective.sizes) :]
    for number, share in enumerate(plan.shares):
        each, size = objective.each[number], objective.sizes[number]
        status = float(flat[plan.num_slots + number])
        totals = sums[place : place + size]
        if status >= _FAILED:
            results[share.name] = _failure(share, each)
        elif status:
            results[share.name] = NonFiniteError(
                f"a log-probability or the loss of adapter {share.name!r} is not a finite number",
                hint="look at its learning rate and data; its gradients are as before this call",
            )
        else:
            results[share.name] = _output(share, flat, each, totals, squares[number])
        place += size
    return results


def _failure(share: Share, objective: Objective) -> MegatrainError:
    error = StateError(
        f"the loss of adapter {share.name!r} failed: {objective.failure or 'on another rank'}",
        hint="its gradients are as before this call",
    )
    error.__cause__ = objective.failure
    return error


def _output(
    share: Share, flat: FloatArray, objective: Objective, totals: list[float], squares: float
) -> StepOutput:
    loss_sum, statistics = objective.summary(totals)
    return StepOutput(
        loss=loss_sum / share.divisor if share.divisor else 0.0,
        logps=[np.array(flat[datum.start : datum.start + datum.size]) for datum in share.data],
        num_tokens=share.num_labels,
        divisor=share.divisor,
        statistics={name: s / c for name, (s, c) in statistics.items() if c},
        counts={name: c for name, (_, c) in statistics.items() if c},
        squares=squares,
    )
