"""READ FIRST.  One training step, from a global batch to new adapter weights.

    forward_backward(batch)   pack -> run the pipeline -> add gradients -> logprobs in request order
    clip_grad_and_step()      sum over ranks, divide by tokens, clip -> optimizer -> new weights

Every rank calls every method with the same arguments: the batch is the global batch, and what
comes back is the whole result on every rank.  Sums and counts accumulate over calls; the division
comes at the step, so that neither the packing nor the number of calls changes a gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.errors import ConfigError, DataError, NonFiniteError, StateError
from megatrain.model.microbatch import MicroBatch
from megatrain.model.network import Network
from megatrain.train.agree import agree
from megatrain.train.batch import BatchPlan
from megatrain.train.datum import check_batch
from megatrain.train.losses import cross_entropy
from megatrain.train.optimizer import GradientAccumulator, check_optimizer, make_optimizer
from megatrain.train.schedule import make_schedule
from megatrain.types import InputFeature, StepOutput

BASE = ""
"""The name that stands for the base model's own parameters where an adapter is named."""


@dataclass
class Trained:
    """What belongs to one adapter, or to the base: gradients, optimizer, schedule, counters."""

    gradients: GradientAccumulator
    accumulation_steps: int = 1
    optimizer: torch.optim.Optimizer | None = None
    schedule: torch.optim.lr_scheduler.LambdaLR | None = None
    num_calls: int = 0
    """Calls of clip_grad_and_step since the last real step."""
    step: int = 0
    """Optimizer steps taken."""
    grad_norm: float | None = None
    """Norm of the last gradient, before clipping."""


class Trainer:
    """Trains the adapters of one network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.trained: dict[str, Trained] = {}

    def add(self, name: str, *, accumulation_steps: int = 1) -> None:
        """Start to train an adapter that the network has, or all of the base for BASE."""
        if accumulation_steps < 1:
            raise ConfigError(
                f"gradient_accumulation_steps must be at least 1: {accumulation_steps}"
            )
        if name == BASE:
            parameters = self.network.train_base()
        else:
            parameters = self.network.adapters[name].trained_parameters()
        gradients = GradientAccumulator(parameters, self.network.groups)
        self.trained[name] = Trained(gradients, accumulation_steps)

    def set_optimizer(self, name: str, kind: str, options: dict[str, Any]) -> None:
        """Choose the optimizer of an adapter."""
        if self.network.config.mixed_precision == "fp16":
            raise ConfigError(
                "training in fp16 is not supported: its gradients underflow without loss scaling",
                hint="use mixed_precision='bf16' or 'no'; fp16 is for forward_only",
            )
        trained = self.trained[name]
        trained.optimizer = make_optimizer(kind, trained.gradients, options)
        trained.schedule = None

    def train_base(self, kind: str, options: dict[str, Any]) -> None:
        """Start to train all of the base with this optimizer, or change nothing."""
        check_optimizer(kind, options)
        self.add(BASE)
        self.set_optimizer(BASE, kind, options)

    def set_schedule(self, name: str, kind: str, options: dict[str, Any]) -> None:
        """Choose the learning rate schedule of an adapter."""
        trained = self.trained[name]
        trained.schedule = make_schedule(kind, self._optimizer(name), options)

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        optimizer = self.trained[name].optimizer
        if optimizer is None:
            raise StateError(f"adapter {name!r} has no optimizer", hint="call set_optimizer first")
        return optimizer

    def forward_backward(self, name: str, inputs: Sequence[InputFeature]) -> StepOutput:
        """Add this batch's gradients to an adapter.  Collective.

        Raises DataError before anything has changed; NonFiniteError, with the gradients as they
        were before the call, if a loss is not a number.
        """
        plan = self._plan(inputs, train=True)
        self.network.activate(name)
        trained = self.trained[name]
        if trained.gradients.is_reduced:
            raise StateError(
                "gradients were already summed over ranks by clip_grad_norm",
                hint="call step and zero_grad before the next forward_backward",
            )
        before = trained.gradients.snapshot()
        output = self._run(plan, _weighted_cross_entropy, step=trained.step)
        if isinstance(output, NonFiniteError):
            trained.gradients.restore(before)
            raise output
        trained.gradients.num_tokens += plan.num_labels
        return output

    def forward_only(self, name: str, inputs: Sequence[InputFeature]) -> StepOutput:
        """Return log-probabilities under an adapter, or under the base for BASE.  Collective."""
        plan = self._plan(inputs, train=False)
        self.network.activate(name)
        output = self._run(plan, None, step=self.trained[name].step if name in self.trained else 0)
        if isinstance(output, NonFiniteError):
            raise output
        return output

    def _plan(self, inputs: Sequence[InputFeature], *, train: bool) -> BatchPlan:
        """Check the batch and plan it; all ranks go on with the same one, or none does.

        Raises DataError on every rank if any rank refuses its batch or has another one.
        Collective.
        """
        network = self.network
        try:
            data = check_batch(inputs, vocab_size=network.vocab_size, train=train)
        except DataError as error:
            agree(None, network.groups)
            raise error
        agree(data, network.groups)
        config = network.config
        return BatchPlan(
            data,
            network.groups,
            max_tokens=config.max_tokens_per_microbatch,
            max_data=config.micro_batch_size,
        )

    def _run(self, plan: BatchPlan, loss: Any, *, step: int) -> StepOutput | NonFiniteError:
        batches = plan.micro_batches()
        logps, _ = self.network.run(batches, loss)
        flat = _gather(plan, batches, logps, self.network)
        if isinstance(flat, NonFiniteError):
            return NonFiniteError(f"{flat.message} at step {step}", hint=flat.hint)
        values = flat.cpu().numpy()
        total = -float(values.astype("float64").sum())
        mean = total / plan.num_labels if plan.num_labels else 0.0
        per_datum = [values[d.start : d.start + len(d.input_ids_S)] for d in plan.data]
        return StepOutput(loss=mean, logps=per_datum, num_tokens=plan.num_labels)

    def clip_grad_norm(self, name: str, max_grad_norm: float) -> float:
        """Sum gradients over ranks, scale them to at most this norm, return the norm before it.

        The norm is over all parameters of the adapter on all ranks, each counted once.
        `max_grad_norm` of 0 or infinity does not clip.  Collective.
        """
        if not max_grad_norm >= 0:
            raise ConfigError(f"max_grad_norm must be 0 (do not clip) or more: {max_grad_norm}")
        trained = self.trained[name]
        norm = trained.gradients.norm()
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
        optimizer.step()
        for shard in trained.gradients.shards:
            shard.write_parameters()
        trained.step += 1

    def lr_step(self, name: str) -> None:
        """Move the learning rate schedule on by one step."""
        schedule = self.trained[name].schedule
        if schedule is not None:
            schedule.step()

    def clip_grad_and_step(self, name: str, max_grad_norm: float) -> float | None:
        """Clip, step, zero the gradients and move the schedule, on every n-th call.

        n is the adapter's gradient_accumulation_steps.  Returns the gradient's norm before
        clipping, or None on the calls between.  Collective.
        """
        trained = self.trained[name]
        self._optimizer(name)
        trained.num_calls += 1
        if trained.num_calls < trained.accumulation_steps:
            return None
        trained.num_calls = 0
        norm = self.clip_grad_norm(name, max_grad_norm)
        self.step(name)
        trained.gradients.zero()
        self.lr_step(name)
        return norm

    def zero_grad(self, name: str) -> None:
        """Forget an adapter's gradients, and the calls that led to them."""
        self.trained[name].gradients.zero()
        self.trained[name].num_calls = 0


def _weighted_cross_entropy(logps_N: Tensor, batch: MicroBatch) -> Tensor:
    return cross_entropy(logps_N, batch.weights_N)


def _gather(
    plan: BatchPlan, batches: Sequence[MicroBatch], logps: Sequence[Tensor], network: Network
) -> Tensor | NonFiniteError:
    """Return all log-probabilities in request order, float32, on every rank.  Collective.

    The first TP rank of each last stage writes what it has; a sum over ranks puts it together
    (every slot has one writer, so the sum is exact).  The tail holds one flag a rank.
    """
    groups = network.groups
    world = groups.mesh.world_size
    flat = torch.zeros(plan.num_slots + world, device=groups.device)
    if groups.is_last_stage and groups.tp.rank() == 0:
        for batch, values in zip(batches, logps, strict=True):
            real = batch.slots_N >= 0
            flat[batch.slots_N[real]] = values[real]
        bad = not bool(torch.isfinite(flat).all())
        flat.nan_to_num_(0.0, 0.0, 0.0)
        flat[plan.num_slots + groups.rank] = float(bad)
    dist.all_reduce(flat)
    ranks = flat[plan.num_slots :].nonzero().flatten().tolist()
    if ranks:
        return NonFiniteError(
            f"a log-probability is not a finite number on rank(s) {ranks}",
            hint="look at the learning rate and the data; the gradients are as before this call",
        )
    return flat[: plan.num_slots]
