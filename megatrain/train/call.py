"""One call of a pass: its batch is checked, planned, packed; all ranks go on or none does."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.errors import ConfigError
from megatrain.model.network import Network
from megatrain.train.agree import agree
from megatrain.train.batch import BatchPlan
from megatrain.train.collect import PackedPlan
from megatrain.train.datum import BatchRules, Datum, check_batch
from megatrain.train.loss import Loss
from megatrain.train.loss_inputs import check_names
from megatrain.types import Fetches, InputFeature, ReadsAhead

Prepare = Callable[[Any], Sequence[InputFeature]]
"""From what a script passes to data; what it raises is raised on every rank."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of forward_backward or forward_only, beside its data."""

    name: str
    loss_inputs: Mapping[str, Any]
    micro_batch_size: int | None
    prepare: Prepare | None
    train: bool
    loss: Loss | None = None
    """Instead of the adapter's own."""


def plan_call(
    inputs: Any, call: Call, network: Network, loss_of: Callable[[Call, Any], Loss]
) -> PackedPlan:
    """Return this rank's part of the batch, whose loss `loss_of` chooses.

    Raises DataError, or what a row's reader raised, on every rank if any rank refuses its batch or
    has another one; ConfigError for a divisor that is none.  Collective.
    """
    config, groups = network.config, network.groups
    tokens, size = config.max_tokens_per_microbatch, config.micro_batch_size
    try:
        if call.micro_batch_size is not None:
            tokens, size = None, _positive(call.micro_batch_size)
        rows = inputs if call.prepare is None else call.prepare(inputs)
        loss = loss_of(call, rows)
        check_names(loss, call.loss_inputs)
        rules = BatchRules(network.vocab_size, loss, train=call.train)
        data = check_batch(rows, rules, call.loss_inputs)
        plan = BatchPlan(data, groups, rules, max_tokens=tokens, max_data=size)
        if isinstance(inputs, Fetches):
            inputs.fetch([plan.read_by(rank) for rank in range(groups.mesh.dp)])
        if isinstance(inputs, ReadsAhead):
            inputs.read_ahead(plan.dealer.own)
        divisor = divisor_of(loss, data, train=call.train)
        packed = PackedPlan(plan, plan.micro_batches(), loss, divisor)
    except Exception:  # a row's reader and a loss are anybody's code; others wait in agree
        agree(None, groups)
        raise
    what = repr((call.name, type(loss).__qualname__, call.train, tokens, size)).encode()
    agree([what, *(datum.digest for datum in data)], groups)
    return packed


def _positive(micro_batch_size: Any) -> int:
    if type(micro_batch_size) is not int or micro_batch_size < 1:
        raise ConfigError(f"micro_batch_size must be an integer >= 1: {micro_batch_size!r}")
    return micro_batch_size


def divisor_of(loss: Loss, data: Sequence[Datum], *, train: bool) -> float:
    """Return what the loss's sum is divided by.  Raises ConfigError if it is no number above 0."""
    divisor = float(loss.divisor([datum.num_labels for datum in data]))
    if not math.isfinite(divisor) or divisor < 0 or (train and divisor == 0):
        raise ConfigError(f"the divisor of {type(loss).__name__} must be above 0: {divisor}")
    return divisor
