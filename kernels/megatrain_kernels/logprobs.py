"""Log-probabilities of given tokens from hidden states, without the logits ever being whole.

T tokens, H hidden size, V the vocabulary rows on this rank (a shard of the vocabulary in rank
order), C a chunk of tokens.  The log-sum-exp over the whole vocabulary is put together from one
number per rank and token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 1 << 22
"""Entries of a chunk of logits; 16 MiB in float32."""

LogitsFunction = Callable[[Tensor], Tensor]


def chunk_size(vocabulary_shard: int) -> int:
    """Return how many tokens to take at a time."""
    return max(16, LOGITS_PER_CHUNK // max(1, vocabulary_shard))


def _combine(lse_C: Tensor, target_C: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return (lse, target logit) over the whole vocabulary, shape (2, C)."""
    if group is None or group.size() == 1:
        return torch.stack([lse_C, target_C])
    mine = torch.stack([lse_C, target_C])
    all_ranks = mine.new_empty(group.size() * 2, mine.shape[1])
    dist.all_gather_into_tensor(all_ranks, mine, group=group)
    both = all_ranks.view(group.size(), 2, -1)
    return torch.stack([both[:, 0].logsumexp(0), both[:, 1].sum(0)])


def _local_targets(targets: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return targets as rows of this shard (0 where elsewhere), and which of them are here."""
    local = targets - first_row
    here = (local >= 0) & (local < num_rows)
    return local.masked_fill(~here, 0), here


def _stats(logits_CV: Tensor, rows_C: Tensor, here_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return this shard's log-sum-exp and the target's logit (0 where elsewhere)."""
    target = logits_CV.gather(1, rows_C.unsqueeze(1)).squeeze(1)
    return logits_CV.logsumexp(1), target.masked_fill(~here_C, 0.0)


class _FrozenHead(torch.autograd.Function):
    """log p of targets under a weight that takes no gradient.

    d log p_t / d h_t = W[target_t] - sum_v p_tv W[v] does not depend on the loss, so it is formed
    while the chunk's logits are at hand; backward only scales it.  Two matrix products a chunk
    instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        rows_T: Tensor,
        here_T: Tensor,
        num_real: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        size = chunk_size(weight_VH.shape[0])
        needs_grad = ctx.needs_input_grad[0]
        logps, jacobians = [], []
        for start in range(0, hidden_TH.shape[0], size):
            chunk = slice(start, start + size)
            h, r, i = hidden_TH[chunk], rows_T[chunk], here_T[chunk]
            logits = (h @ weight_VH.T).float()
            logits[:, num_real:] = float("-inf")
            if not needs_grad:
                lse, target = _combine(*_stats(logits, r, i), group)
                logps.append(target - lse)
                continue
            target = logits.gather(1, r.unsqueeze(1)).squeeze(1).masked_fill(~i, 0.0)
            top = logits.amax(1)
            p = logits.sub_(top.unsqueeze(1)).exp_()
            lse, target = _combine(top + p.sum(1).log(), target, group)
            logps.append(target - lse)
            # exp(top - lse) makes p a share of the whole vocabulary.  The target's 1 goes in before
            # the product: after it, half precision would lose what a confident token has left.
            p.mul_((top - lse).exp_().neg_().unsqueeze(1))
            p.scatter_add_(1, r.unsqueeze(1), i.float().unsqueeze(1))
            jacobians.append(p.to(weight_VH.dtype) @ weight_VH)
        if needs_grad:
            ctx.save_for_backward(torch.cat(jacobians))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (jacobian_TH,) = ctx.saved_tensors
        grad = grads[0].unsqueeze(1).to(jacobian_TH.dtype) * jacobian_TH
        return grad, None, None, None, None, None


class _CombineOverVocabulary(torch.autograd.Function):
    """target - lse over all shards, with the gradient that each shard is owed."""

    @staticmethod
    def forward(
        ctx: Any, lse_C: Tensor, target_C: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        lse, target = _combine(lse_C, target_C, group)
        ctx.save_for_backward((lse_C - lse).exp())
        return target - lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (share_C,) = ctx.saved_tensors
        return -grads[0] * share_C, grads[0], None


def frozen_head_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    first_row: int = 0,
    num_real: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return log softmax(hidden W^T)[target] in float32, shape (T,).  Collective over `group`.

    `first_row` is the vocabulary index of the shard's first row; rows from `num_real` on are
    padding.  The gradient for `hidden_TH` is this shard's part: the caller sums it over `group`.
    """
    num_rows = weight_VH.shape[0]
    num_real = num_rows if num_real is None else num_real
    rows, here = _local_targets(targets_T, first_row, num_rows)
    result: Tensor = _FrozenHead.apply(hidden_TH, weight_VH, rows, here, num_real, group)
    return result


def logprobs(
    hidden_TH: Tensor,
    logits_of: LogitsFunction,
    targets_T: Tensor,
    *,
    num_rows: int,
    first_row: int = 0,
    num_real: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the same as frozen_head_logprobs for any differentiable `logits_of`.

    `logits_of` maps a chunk (C, H) to this shard's logits (C, V).  They are recomputed in
    backward, chunk by chunk.
    """
    num_real = num_rows if num_real is None else num_real
    rows, here = _local_targets(targets_T, first_row, num_rows)

    def chunk_stats(h: Tensor, r: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(h).float()
        if num_real < num_rows:
            logits = torch.cat(
                [logits[:, :num_real], torch.full_like(logits[:, num_real:], float("-inf"))], 1
            )
        return _stats(logits, r, i)

    parts = []
    size = chunk_size(num_rows)
    for start in range(0, hidden_TH.shape[0], size):
        c = slice(start, start + size)
        lse, target = checkpoint(chunk_stats, hidden_TH[c], rows[c], here[c], use_reentrant=False)
        parts.append(_CombineOverVocabulary.apply(lse, target, group))
    return torch.cat(parts)
