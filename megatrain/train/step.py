"""READ FIRST.  One training step, from a global batch to new adapter weights.

    forward_backward(batch)   pack -> run the pipeline -> add gradients -> logprobs in request order
    clip_grad_and_step()      sum over ranks, divide by labels, clip -> optimizer -> new weights

Every rank calls every method with the same arguments: the batch is the global batch, and what
comes back is the whole result on every rank.  Sums and counts accumulate over calls; the division
comes at the step, so that neither the packing nor the number of calls changes a gradient.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatrain.errors import ConfigError, NonFiniteError, StateError
from megatrain.model.network import Network
from megatrain.parallel import phase
from megatrain.parallel.dropout import seed_dropout
from megatrain.train.call import Call, Prepare, plan_call
from megatrain.train.collect import PackedPlan, collect
from megatrain.train.loss import Loss
from megatrain.train.losses.likelihood import CrossEntropyLoss
from megatrain.train.losses.reward_model import RewardModelLoss
from megatrain.train.objective import Objective, ScoresOnly
from megatrain.train.optimizer import (
    GradientAccumulator,
    check_optimizer,
    make_optimizer,
    set_options,
)
from megatrain.train.schedule import make_schedule
from megatrain.types import LazyRow, StepOutput

BASE = ""
"""The name that stands for the base model's own parameters where an adapter is named."""


@dataclass
class Trained:
    """What belongs to one adapter, or to the base: gradients, optimizer, schedule, counters."""

    gradients: GradientAccumulator
    accumulation_steps: int = 1
    loss: Loss = field(default_factory=CrossEntropyLoss)
    """What forward_backward minimises."""
    num_passes: int = 0
    """Passes since the last step: they decide, with the step, what dropout draws."""
    optimizer: torch.optim.Optimizer | None = None
    optimizer_choice: tuple[str, dict[str, Any]] | None = None
    """Kind and options, as set_optimizer got them."""
    schedule: torch.optim.lr_scheduler.LambdaLR | None = None
    schedule_choice: tuple[str, dict[str, Any]] | None = None
    """Kind and options, as set_schedule got them."""
    last_lr: float | None = None
    """Learning rate of the last step."""
    num_calls: int = 0
    """Calls of clip_grad_and_step since the last real step."""
    step: int = 0
    """Optimizer steps taken."""
    grad_norm: float | None = None
    """Norm of the last gradient, before clipping."""


class Trainer:
    """Trains the adapters of one network."""

    def __init__(self, network: Network, *, seed: int = 42) -> None:
        self.network, self.seed = network, seed
        self.trained: dict[str, Trained] = {}

    def add(self, name: str, *, accumulation_steps: int = 1) -> None:
        """Start to train an adapter that the network has, or all of the base for BASE."""
        if accumulation_steps < 1:
            raise ConfigError(
                f"gradient_accumulation_steps must be at least 1: {accumulation_steps}"
            )
        if name == BASE:
            parameters = self.network.train_base(seed=self.seed)
        else:
            parameters = self.network.adapters[name].trained_parameters()
        gradients = GradientAccumulator(parameters, self.network.groups)
        self.trained[name] = Trained(gradients, accumulation_steps, self._default_loss())

    def delete(self, name: str) -> None:
        """Forget an adapter with its gradients and optimizer; the others stay as they are.

        Raises StateError for the base, whose parameters cannot be taken away.
        """
        if name == BASE:
            raise StateError(
                "the base itself cannot be deleted", hint="close the model, and open it again"
            )
        self.trained.pop(name).gradients.release()
        self.network.remove_adapter(name)

    def _default_loss(self) -> Loss:
        return RewardModelLoss() if self.network.has_scores else CrossEntropyLoss()

    def set_optimizer(self, name: str, kind: str, options: dict[str, Any]) -> None:
        """Choose the optimizer of an adapter.  Collective."""
        self._check_precision()
        trained = self.trained[name]
        trained.optimizer = make_optimizer(kind, trained.gradients, options)
        trained.optimizer_choice = kind, dict(options)
        trained.schedule = trained.schedule_choice = None

    def _check_precision(self) -> None:
        if self.network.config.mixed_precision == "fp16":
            raise ConfigError(
                "training in fp16 is not supported: its gradients underflow without loss scaling",
                hint="use mixed_precision='bf16' or 'no'; fp16 is for forward_only",
            )

    def train_base(self, kind: str, options: dict[str, Any]) -> None:
        """Start to train all of the base with this optimizer, or change nothing."""
        self._check_precision()
        check_optimizer(kind, options)
        self.add(BASE)
        try:
            self.set_optimizer(BASE, kind, options)
        except BaseException:
            self.trained.pop(BASE).gradients.release()
            self.network.freeze_base()
            raise

    def set_schedule(self, name: str, kind: str, options: dict[str, Any]) -> None:
        """Choose the learning rate schedule of an adapter."""
        trained = self.trained[name]
        trained.schedule = make_schedule(kind, self._optimizer(name), options)
        trained.schedule_choice = kind, dict(options)

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        optimizer = self.trained[name].optimizer
        if optimizer is None:
            raise StateError(f"adapter {name!r} has no optimizer", hint="call set_optimizer first")
        return optimizer

    def set_loss(self, name: str, loss: Loss) -> None:
        """Choose what forward_backward minimises."""
        if loss.uses_scores != self.network.has_scores:
            raise ConfigError(
                f"{type(loss).__name__} "
                + ("needs" if loss.uses_scores else "does not go with")
                + " a model with a score head",
                hint="MegatronModel(task='reward') has one, task='causal_lm' has not",
            )
        self.trained[name].loss = loss

    def forward_backward(
        self,
        name: str,
        inputs: Any,
        loss_inputs: Mapping[str, Any] | None = None,
        *,
        micro_batch_size: int | None = None,
        prepare: Prepare | None = None,
        loss: Loss | None = None,
    ) -> StepOutput:
        """Add this batch's gradients to an adapter.  Collective.

        `prepare` makes InputFeatures of `inputs`; without one they are such.  `loss` stands for
        the adapter's own in this call.
        Raises DataError before anything has changed; NonFiniteError, with the gradients as they
        were before the call, if a loss is not a number.
        """
        trained = self.trained[name]
        if trained.gradients.is_reduced:
            raise StateError(
                "gradients were already summed over ranks by clip_grad_norm",
                hint="call step and zero_grad before the next forward_backward",
            )
        call = Call(name, loss_inputs or {}, micro_batch_size, prepare, True, loss)
        plan = plan_call(inputs, call, self.network, self.loss_of)
        trained.gradients.check_reduction(name, is_sum=plan.loss.is_sum)
        self.network.activate(name)
        seed_dropout(self.network.groups, self.seed, name, trained.step, trained.num_passes)
        trained.num_passes += 1
        before = trained.gradients.snapshot()
        try:
            output = self._run(plan, train=True, step=trained.step)
        except BaseException:
            trained.gradients.restore(before)
            raise
        trained.gradients.count(output.divisor, is_sum=plan.loss.is_sum)
        return output

    def forward_only(
        self,
        name: str,
        inputs: Any,
        loss_inputs: Mapping[str, Any] | None = None,
        *,
        micro_batch_size: int | None = None,
        prepare: Prepare | None = None,
        loss: Loss | None = None,
    ) -> StepOutput:
        """Return log-probabilities, and the loss, under an adapter, or the base for BASE.

        The loss is the one given, or the adapter's if the call, or its data, bring what it needs.
        It is the cross-entropy of all labels where neither do, where data are no whole pairs, and
        for a base that is not trained.  Collective.
        """
        call = Call(name, loss_inputs or {}, micro_batch_size, prepare, False, loss)
        plan = plan_call(inputs, call, self.network, self.loss_of)
        self.network.activate(name)
        step = self.trained[name].step if name in self.trained else 0
        return self._run(plan, train=False, step=step)

    def loss_of(self, call: Call, inputs: Any) -> Loss:
        """Return what a call computes: its adapter's loss, or the cross-entropy (forward_only)."""
        if call.loss is not None:
            return call.loss
        loss = self.trained[call.name].loss if call.name in self.trained else self._default_loss()
        if call.train:
            return loss
        is_whole = isinstance(inputs, Sequence) and len(inputs) % loss.unit == 0
        if self.network.has_scores:
            return loss if is_whole else ScoresOnly()
        if call.loss_inputs:
            return loss
        needed = {key for key, spec in loss.inputs.items() if spec.required}
        if needed and is_whole:
            needed -= {name for datum in inputs for name in _columns(datum)}
        return CrossEntropyLoss() if needed or not is_whole else loss

    def _run(self, plan: PackedPlan, *, train: bool, step: int) -> StepOutput:
        objective = Objective(plan.loss, self.network.groups)
        rows, totals = self.network.run(plan.batches, objective, train=train)
        result = collect(plan, rows, totals, objective)
        if isinstance(result, NonFiniteError):
            raise NonFiniteError(f"{result.message} at step {step}", hint=result.hint)
        if isinstance(result, Exception):
            raise result
        return result

    def clip_grad_norm(
        self, name: str, max_grad_norm: float, *, may_be_zero: bool = False
    ) -> float:
        """Sum gradients over ranks, scale them to at most this norm, return the norm before it.

        The norm is over all parameters of the adapter on all ranks, each counted once.
        `max_grad_norm` of 0 or infinity does not clip.  Without a call of forward_backward there
        is no gradient, a StateError unless it `may_be_zero`.  Collective.
        """
        _check_max_norm(max_grad_norm)
        trained = self.trained[name]
        phase.enter(phase.STEPPING)
        norm = trained.gradients.norm(may_be_zero=may_be_zero)
        if not math.isfinite(norm):
            trained.gradients.zero()
            raise NonFiniteError(
                f"the gradient's norm is {norm} at step {trained.step}; the gradient was dropped"
            )
        trained.grad_norm = norm
        if 0 < max_grad_norm < norm:
            trained.gradients.scale(max_grad_norm / (norm + 1e-6))
        return norm

    def step(self, name: str) -> None:
        """Let the optimizer change the adapter's weights.  Collective."""
        trained, optimizer = self.trained[name], self._optimizer(name)
        if not trained.gradients.is_reduced:
            self.clip_grad_norm(name, math.inf)
        phase.enter(phase.STEPPING)
        trained.last_lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for shard in trained.gradients.shards:
            shard.write_parameters()
        trained.step += 1
        trained.num_passes = 0

    def lr_step(self, name: str) -> None:
        """Move the learning rate schedule on by one step."""
        schedule = self.trained[name].schedule
        if schedule is not None:
            schedule.step()

    def clip_grad_and_step(
        self, name: str, max_grad_norm: float, options: Mapping[str, Any] | None = None
    ) -> float | None:
        """Clip, step, zero the gradients and move the schedule, on every n-th call.

        n is the adapter's gradient_accumulation_steps.  `options` of the optimizer (lr, betas...)
        hold from this step on; with them the gradient may be zero for want of forward_backward.
        Returns the gradient's norm before clipping, or None on the calls between.  Collective.
        """
        trained = self.trained[name]
        optimizer = self._optimizer(name)
        _check_max_norm(max_grad_norm)
        if options is not None:
            set_options(optimizer, options)
        if trained.num_calls + 1 < trained.accumulation_steps:
            trained.num_calls += 1
            return None
        norm = self.clip_grad_norm(name, max_grad_norm, may_be_zero=options is not None)
        self.step(name)
        trained.num_calls = 0
        trained.gradients.zero()
        self.lr_step(name)
        return norm

    def zero_grad(self, name: str) -> None:
        """Forget an adapter's gradients, and the calls that led to them."""
        self.trained[name].gradients.zero()
        self.trained[name].num_calls = 0


def _columns(datum: Any) -> Collection[str]:
    """Return the names of what a datum brings for a loss; a LazyRow is not read for it."""
    if isinstance(datum, LazyRow):
        return datum.numbers
    return datum.keys() if isinstance(datum, Mapping) else ()


def _check_max_norm(max_grad_norm: float) -> None:
    if not max_grad_norm >= 0:
        raise ConfigError(f"max_grad_norm must be 0 (do not clip) or more: {max_grad_norm}")
