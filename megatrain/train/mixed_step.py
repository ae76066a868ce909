"""One pass for data of several adapters: each gets the gradients that it would get alone.

    shares    each adapter's data, checked by its own loss    datum.py
    pass      packed together, one schedule, grouped deltas   mixed_plan.py, model/mixed_lora.py
    collect   each adapter's results, or what is wrong        mixed_collect.py

Adapters that cannot share a pass (dropout, a score head, a teacher's tokens) have one of their own.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatrain.errors import ConfigError, MegatrainError, StateError
from megatrain.model.network import Network
from megatrain.parallel.dropout import seed_dropout
from megatrain.train.agree import agree
from megatrain.train.call import Call, divisor_of
from megatrain.train.datum import BatchRules, check_batch
from megatrain.train.loss import Loss
from megatrain.train.loss_inputs import check_names
from megatrain.train.losses.make import make_loss
from megatrain.train.mixed_collect import Results, collect_mixed
from megatrain.train.mixed_objective import MixedObjective
from megatrain.train.mixed_plan import MixedPlan, Share
from megatrain.train.step import BASE, Trained, Trainer
from megatrain.types import AdapterBatch, Fetches, StepOutput


def run_mixed(trainer: Trainer, batches: Sequence[AdapterBatch], *, train: bool) -> Results:
    """Run all batches and, with `train`, add each adapter's gradients.  Collective.

    An adapter whose loss is not a finite number, or fails, keeps the gradients that it had, and its
    result is the error; the others go on.  Raises DataError, ConfigError or StateError, naming the
    adapter, before anything has changed.
    """
    check_names_of(trainer.trained, batches, train=train)
    losses = {each.adapter: _loss(trainer, each, train=train) for each in batches}
    for name, loss in losses.items() if train else ():
        trainer.trained[name].gradients.check_reduction(name, is_sum=loss.is_sum)
    together = [b for b in batches if _can_share(trainer, b.adapter, losses[b.adapter], train)]
    if len(together) < 2:
        together = []
    if train and len(batches) > 1:  # what is wrong is said before the first one is changed
        alone = [batch for batch in batches if all(batch is not each for each in together)]
        if alone:
            check_shares(trainer.network, alone, losses)
    plan = None
    if together:
        plan = _plan(trainer, together, losses, train=train)
    results: Results = {}
    for batch in batches:
        if all(batch is not each for each in together):
            results[batch.adapter] = _alone(trainer, batch, train=train)
    if plan is not None:
        results |= _together(trainer, plan, train=train)
    return {batch.adapter: results[batch.adapter] for batch in batches}


def check_shares(
    network: Network, batches: Sequence[AdapterBatch], losses: Mapping[str, Loss]
) -> None:
    """Raise what is wrong with any adapter's data, before the first of them is changed.

    Rows that are still to be fetched are left to the pass.  Raises DataError or ConfigError on
    every rank if any rank refuses its batch or has another one.  Collective.
    """
    there = [batch for batch in batches if not isinstance(batch.inputs, Fetches)]
    try:
        shares = [_share(network, each, losses[each.adapter], 0, train=True) for each in there]
    except Exception:  # a row's reader and a loss are anybody's code; others wait in agree
        agree(None, network.groups)
        raise
    agree([datum.digest for share in shares for datum in share.data], network.groups)


def check_names_of(
    trained: Mapping[str, Trained], batches: Sequence[AdapterBatch], *, train: bool
) -> None:
    """Raise ConfigError or StateError for adapters that are not there, or there twice."""
    names = [batch.adapter for batch in batches]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"a pass of several adapters names each once: {names}")
    for name in names:
        if name not in trained and (train or name != BASE):
            raise StateError(f"there is no adapter called {name!r}")
        if train and trained[name].gradients.is_reduced:
            raise StateError(
                f"gradients of {name!r} were already summed over ranks by clip_grad_norm",
                hint="call step and zero_grad before the next forward_backward",
            )


def _loss(trainer: Trainer, batch: AdapterBatch, *, train: bool) -> Loss:
    call = Call(batch.adapter, batch.loss_inputs, None, None, train, own_loss(batch))
    return trainer.loss_of(call, batch.inputs)


def own_loss(batch: AdapterBatch) -> Loss | None:
    """Return the loss that a batch names for itself.  Raises ConfigError."""
    if batch.loss is None:
        return None
    name, options = batch.loss
    return _named_loss(name, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=256)
def _named_loss(name: str, options: tuple[tuple[str, Any], ...]) -> Loss:
    return make_loss(name, dict(options))


def _can_share(trainer: Trainer, name: str, loss: Loss, train: bool) -> bool:
    network = trainer.network
    adapter = network.adapters.get(name)
    drops = train and adapter is not None and adapter.spec.lora_dropout > 0
    takes_more_tokens = any(each.kind == "top_k" for each in loss.inputs.values())
    sharded = network.groups.fsdp is not None
    return not (drops or takes_more_tokens or loss.uses_scores or sharded or network.trains_base)


def _alone(trainer: Trainer, batch: AdapterBatch, *, train: bool) -> StepOutput | MegatrainError:
    run = trainer.forward_backward if train else trainer.forward_only
    try:
        return run(batch.adapter, batch.inputs, batch.loss_inputs, loss=own_loss(batch))
    except MegatrainError as error:  # others may have their gradients already
        return error


def _plan(
    trainer: Trainer, batches: Sequence[AdapterBatch], losses: Mapping[str, Loss], *, train: bool
) -> tuple[MixedPlan, list[Any]]:
    """Return the plan and this rank's micro-batches: on all ranks, or on none.  Collective."""
    network, groups = trainer.network, trainer.network.groups
    try:
        shares, start = [], 0
        for batch in batches:
            shares.append(_share(network, batch, losses[batch.adapter], start, train=train))
            start += sum(datum.size for datum in shares[-1].data)
        plan = MixedPlan(shares, groups, max_tokens=network.config.max_tokens_per_microbatch)
        for number, batch in enumerate(batches):
            if isinstance(batch.inputs, Fetches):
                ranks = range(groups.mesh.dp)
                batch.inputs.fetch([plan.read_by(rank, number) for rank in ranks])
        micro_batches = plan.micro_batches()
    except Exception:  # a row's reader and a loss are anybody's code; others wait in agree
        agree(None, groups)
        raise
    what = repr([(s.name, type(s.rules.loss).__qualname__, train) for s in shares]).encode()
    agree([what, *(datum.digest for share in shares for datum in share.data)], groups)
    return plan, micro_batches


def _share(network: Network, batch: AdapterBatch, loss: Loss, start: int, *, train: bool) -> Share:
    try:
        check_names(loss, batch.loss_inputs)
        rules = BatchRules(network.vocab_size, loss, train=train)
        data = check_batch(batch.inputs, rules, batch.loss_inputs)
        divisor = divisor_of(loss, data, train=train)
    except MegatrainError as error:
        raise type(error)(f"adapter {batch.adapter!r}: {error.message}", hint=error.hint) from error
    moved = [replace(datum, start=datum.start + start) for datum in data]
    return Share(batch.adapter, rules, moved, divisor)


def _together(trainer: Trainer, planned: tuple[MixedPlan, list[Any]], *, train: bool) -> Results:
    plan, micro_batches = planned
    network, trained = trainer.network, trainer.trained
    names = [share.name for share in plan.shares]
    network.activate_mixture()
    seed_dropout(network.groups, trainer.seed, *names)  # nothing drops; the state is defined
    before = {name: trained[name].gradients.snapshot() for name in names if train}
    objective = MixedObjective([_given(share.rules.loss) for share in plan.shares], network.groups)
    try:
        rows, totals = network.run(micro_batches, objective, train=train)
        results = collect_mixed(plan, micro_batches, rows, totals, objective)
    except BaseException:
        for name, sums in before.items():
            trained[name].gradients.restore(sums)
        raise
    finally:
        network.active.mixture = None
    share_of = {share.name: share for share in plan.shares}
    for name, result in results.items() if train else ():
        trained[name].num_passes += 1
        if isinstance(result, StepOutput):
            is_sum = _given(share_of[name].rules.loss).is_sum
            trained[name].gradients.count(result.divisor, is_sum=is_sum)
        else:
            trained[name].gradients.restore(before[name])
    return results


def _given(loss: Loss | None) -> Loss:
    assert loss is not None
    return loss
