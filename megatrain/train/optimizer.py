"""The optimizer of one adapter, on float32 master weights that are split over DP.

AdamW, Adam and SGD are torch's own, entry by entry; Muon is muon.py's.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from megatrain.config.names import check_known
from megatrain.errors import ConfigError, StateError
from megatrain.model.tensor_slice import TrainedParameter
from megatrain.parallel.groups import Groups
from megatrain.train.muon import Muon, MuonOptions
from megatrain.train.parameter_groups import GroupOptions, present_keys
from megatrain.train.sharded_fsdp import make_shards

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "default": torch.optim.AdamW,
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
    "Muon": Muon,
}
"""By exact name."""


class GradientAccumulator:
    """Gradients of one adapter, and what their sum is to be divided by."""

    def __init__(self, trained: Sequence[TrainedParameter], groups: Groups) -> None:
        self.groups = groups
        # A score head stays whole beside a base that is sharded over the fsdp axis.
        kinds: dict[tuple[bool, bool], list[TrainedParameter]] = {}
        for each in trained:
            kind = each.is_expert, isinstance(each.parameter, DTensor)
            kinds.setdefault(kind, []).append(each)
        # A stage without trained parameters still takes part in collectives over all ranks.
        self.shards = [
            make_shards(kinds[kind], groups, is_expert=kind[0]) for kind in sorted(kinds)
        ]
        self.divisor = 0.0
        self.is_sum = False
        """Whether what was added up is not to be divided."""
        self.is_reduced = False

    def check_reduction(self, name: str, *, is_sum: bool) -> None:
        """Raise StateError if gradients of the other reduction wait for a step."""
        if self.divisor and self.is_sum != is_sum:
            ways = ("sum", "mean") if is_sum else ("mean", "sum")
            raise StateError(
                f"gradients of {name!r} are a {ways[1]}, and this loss is a {ways[0]}",
                hint="take a step between them, or give both losses one reduction",
            )

    def count(self, divisor: float, *, is_sum: bool) -> None:
        """Note that a call has added its gradients."""
        self.divisor = divisor if is_sum else self.divisor + divisor
        self.is_sum = is_sum

    def release(self) -> None:
        """Let go of the parameters: their gradients come here no longer."""
        for shard in self.shards:
            for hook in shard.hooks:
                hook.remove()

    def reduce(self, *, may_be_zero: bool = False) -> None:
        """Turn sums into the gradient of what the losses ask for.  Collective."""
        if self.divisor == 0 and not may_be_zero:
            raise StateError(
                "there is no gradient to step on", hint="call forward_backward before step"
            )
        if not self.is_reduced:
            for shard in self.shards:
                shard.reduce(1.0 / (self.divisor or 1.0))
            self.is_reduced = True

    def norm(self, *, may_be_zero: bool = False) -> float:
        """Return the global L2 norm of the reduced gradient.  Collective over all ranks."""
        self.reduce(may_be_zero=may_be_zero)
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for shard in self.shards:
            total += shard.squared_norm()
        dist.all_reduce(total)
        return float(total.sqrt())

    def scale(self, factor: float) -> None:
        """Multiply the reduced gradient."""
        for shard in self.shards:
            assert shard.grad_Q is not None
            shard.grad_Q.mul_(factor)

    def snapshot(self) -> list[torch.Tensor] | None:
        """Return a copy of the sums so far; None if there are none yet."""
        return [shard.grad_P.clone() for shard in self.shards] if self.divisor else None

    def restore(self, sums: list[torch.Tensor] | None) -> None:
        """Go back to what snapshot returned."""
        if sums is None:
            self.zero()
            return
        for shard, old in zip(self.shards, sums, strict=True):
            shard.grad_P.copy_(old)

    def fetch(self) -> None:
        """Bring reduced gradients to an offloaded optimizer."""
        for shard in self.shards:
            shard.fetch_gradients()

    def zero(self) -> None:
        """Forget gradients and tokens."""
        for shard in self.shards:
            shard.zero_grad()
        self.divisor, self.is_sum, self.is_reduced = 0.0, False, False


def make_optimizer(
    name: str, accumulator: GradientAccumulator, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Return an optimizer over this rank's master weights, as `set_optimizer` describes it.

    Its parameter groups are the same on every rank and every layout.  Collective over all ranks.
    Raises ConfigError for an unknown name or option, before anything has changed.
    """
    defaults = check_optimizer(name, options)
    own, grouping, offload = _sort(name, options)
    trained = [t for shard in accumulator.shards for t in shard.trained]
    muon = OPTIMIZERS[name] is Muon
    if muon and any(isinstance(t.parameter, DTensor) for t in trained):
        raise ConfigError("Muon needs whole matrices and fsdp shards them", hint="use AdamW")
    keys = present_keys(grouping, trained, accumulator.groups, muon=muon)
    for shard in accumulator.shards:
        shard.place(offload=offload)
        shard.split(lambda t: keys.index(grouping.key_of(t, muon=muon)))
    pieces = [piece for shard in accumulator.shards for piece in shard.pieces]
    device = torch.device("cpu") if offload else accumulator.groups.device
    groups = []
    for number, key in enumerate(keys):
        members = [piece.parameter for piece in pieces if piece.group == number]
        # A stage without such parameters has the group all the same: its schedule goes on.
        members = members or [torch.nn.Parameter(torch.zeros(0, device=device))]
        groups.append({"params": members, **grouping.overrides(key, defaults)})
    if muon:
        own["shards"] = accumulator.shards
    optimizer = OPTIMIZERS[name](groups, **own)
    if offload:
        optimizer.register_step_pre_hook(lambda *_: accumulator.fetch())
    return optimizer


def check_optimizer(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with their defaults.  Raises ConfigError for unknown or wrong ones."""
    check_known("optimizer", [name], OPTIMIZERS)
    known = {*_own_options(name), "offload_optimizer"}
    known |= {field.name for field in dataclasses.fields(GroupOptions)}
    if OPTIMIZERS[name] is not Muon:
        known.remove("adamw_parameters")
    check_known(f"option of {name}", options, known)
    own, grouping, _ = _sort(name, options)
    try:
        optimizer = OPTIMIZERS[name]([{"params": [torch.nn.Parameter(torch.zeros(1))]}], **own)
        muon = OPTIMIZERS[name] is Muon
        for key in grouping.keys(muon=muon):
            grouping.overrides(key, optimizer.defaults)
    except (TypeError, ValueError, RuntimeError) as error:
        given = dict(options)
        raise ConfigError(f"{name} does not take these options: {given}: {error}") from error
    return optimizer.defaults


def _sort(name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], GroupOptions, bool]:
    """Return the optimizer's own options, those that make groups, and whether to offload."""
    own = dict(options)
    offload = own.pop("offload_optimizer", False)
    if not isinstance(offload, bool):
        raise ConfigError(f"offload_optimizer must be True or False: {offload!r}")
    names = [field.name for field in dataclasses.fields(GroupOptions) if field.name in own]
    grouping = GroupOptions(**{each: own.pop(each) for each in names})
    if OPTIMIZERS[name] is not Muon and own.get("foreach") is None and own.get("fused") is None:
        own["fused"] = True  # one pass over memory, on the CPU as well
    return own, grouping, offload


def _own_options(name: str) -> set[str]:
    """Return what the optimizer takes, without what cannot work on flat master weights."""
    if OPTIMIZERS[name] is Muon:
        return {field.name for field in dataclasses.fields(MuonOptions)}
    taken = set(inspect.signature(OPTIMIZERS[name]).parameters)
    return taken - {"params", "capturable", "differentiable"}


def set_options(optimizer: torch.optim.Optimizer, options: Mapping[str, Any]) -> None:
    """Change options of an optimizer in all its groups, from the next step on.

    Raises ConfigError, before anything has changed, for one that its groups do not have, or a
    value that is not finite or negative.
    """
    known = set(optimizer.param_groups[0]) - {"params"}
    check_known(f"option of {type(optimizer).__name__}", options, known)
    for name, value in options.items():
        numbers = value if isinstance(value, Sequence) else [value]
        if not all(isinstance(n, int | float) and 0 <= n < math.inf for n in numbers):
            raise ConfigError(f"{name} must be made of finite numbers of at least 0: {value!r}")
        if name == "betas" and not (len(numbers) == 2 and all(n < 1 for n in numbers)):
            raise ConfigError(f"betas must be two numbers in [0, 1): {value!r}")
    for group in optimizer.param_groups:
        for name, value in options.items():
            group[name] = tuple(value) if isinstance(value, Sequence) else value
