"""The optimizer of one adapter: torch's own, on float32 master weights that are split over DP."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatrain.errors import ConfigError, StateError
from megatrain.model.tensor_slice import TrainedParameter
from megatrain.parallel.groups import Groups
from megatrain.train.sharded import ShardedParameters

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
}
"""By exact name.  Each works entry by entry, which is what splitting the masters needs."""


class GradientAccumulator:
    """Gradients of one adapter, and the number of label tokens they are a sum over."""

    def __init__(self, trained: Sequence[TrainedParameter], groups: Groups) -> None:
        self.groups = groups
        kinds = {
            is_expert: [t for t in trained if t.is_expert == is_expert]
            for is_expert in (False, True)
        }
        # A stage without trained parameters still takes part in collectives over all ranks.
        self.shards = [
            ShardedParameters(members, groups, is_expert=is_expert)
            for is_expert, members in kinds.items()
            if members
        ]
        self.num_tokens = 0
        self.is_reduced = False

    def reduce(self) -> None:
        """Turn sums into the gradient of the mean over label tokens.  Collective."""
        if self.num_tokens == 0:
            raise StateError(
                "there is no gradient to step on", hint="call forward_backward before step"
            )
        if not self.is_reduced:
            for shard in self.shards:
                shard.reduce(1.0 / self.num_tokens)
            self.is_reduced = True

    def norm(self) -> float:
        """Return the global L2 norm of the reduced gradient.  Collective over all ranks."""
        self.reduce()
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
        return [shard.grad_P.clone() for shard in self.shards] if self.num_tokens else None

    def restore(self, sums: list[torch.Tensor] | None) -> None:
        """Go back to what snapshot returned."""
        if sums is None:
            self.zero()
            return
        for shard, old in zip(self.shards, sums, strict=True):
            shard.grad_P.copy_(old)

    def zero(self) -> None:
        """Forget gradients and tokens."""
        for shard in self.shards:
            shard.zero_grad()
        self.num_tokens, self.is_reduced = 0, False


def make_optimizer(
    name: str, accumulator: GradientAccumulator, options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return torch's optimizer over this rank's master weights.

    Raises ConfigError for an unknown name or option.
    """
    masters = [p.parameter for shard in accumulator.shards for p in shard.split(lambda _: 0)]
    # A stage without trained parameters has an optimizer all the same: its schedule goes on.
    masters = masters or [torch.nn.Parameter(torch.zeros(0, device=accumulator.groups.device))]
    return _construct(name, masters, options)


def check_optimizer(name: str, options: dict[str, Any]) -> None:
    """Raise ConfigError for an unknown name or option."""
    _construct(name, [torch.nn.Parameter(torch.zeros(1))], options)


def _construct(
    name: str, masters: list[torch.nn.Parameter], options: dict[str, Any]
) -> torch.optim.Optimizer:
    if name not in OPTIMIZERS:
        raise ConfigError(f"unknown optimizer {name!r}; known: {', '.join(OPTIMIZERS)}")
    try:
        return OPTIMIZERS[name](masters, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} does not take these options: {options}: {error}") from error
