"""What ranks do for test_vocabulary_shards."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain_kernels.logprobs import frozen_head_logprobs, logprobs, soft_cap

T, H, V = 23, 8, 45


def make_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states (T, H), a head (V, H) and targets (T,), the same in every process."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(T, H, generator=generator).requires_grad_()
    weight = torch.randn(V, H, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, V, (T,), generator=generator)


def weighted_sum(logps: Tensor) -> Tensor:
    """Return a scalar in which every value counts differently."""
    return (logps * torch.linspace(-1, 2, len(logps))).sum()


def sharded_logprobs(head: str, cap: float | None) -> dict[str, Any]:
    """Return log-probabilities and gradients from this rank's rows, the last shard padded."""
    hidden, weight, targets = make_problem()
    group = dist.group.WORLD
    rows = -(-V // group.size())
    first = group.rank() * rows
    shard = torch.zeros(rows, H)
    mine = weight.detach()[first : first + rows]
    shard[: len(mine)] = mine
    place = {"first_row": first, "num_real": len(mine), "group": group}
    if head == "frozen":
        logps, is_top = frozen_head_logprobs(hidden, shard, targets, cap=cap, **place)
    else:
        shard.requires_grad_()

        def logits_of(h: Tensor) -> Tensor:
            return h @ shard.T if cap is None else soft_cap(h @ shard.T, cap)

        logps, is_top = logprobs(hidden, logits_of, targets, num_rows=rows, **place)
    weighted_sum(logps).backward()
    return {"logps": logps.detach(), "is_top": is_top, "hidden": hidden.grad, "weight": shard.grad}
