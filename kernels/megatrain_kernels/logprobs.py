"""Log-probabilities of given tokens from hidden states, without the logits ever being whole.

T tokens, H hidden size, V the vocabulary rows on this rank (a shard of the vocabulary in rank
order), C a chunk of tokens.  The log-sum-exp over the whole vocabulary is put together from one
number per rank and token.
"""

from collections.abc import Callable
from dataclasses import dataclass
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


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(logits / cap), in float32: no logit is larger than the cap."""
    return torch.tanh(logits.float() / cap) * cap


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What a frozen head must know beside its weight."""

    num_real: int
    group: dist.ProcessGroup | None
    cap: float | None


def _combine(
    lse_C: Tensor, target_CK: Tensor, top_C: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exp, target logits and largest logit over the whole vocabulary."""
    if group is None or group.size() == 1:
        return lse_C, target_CK, top_C
    mine = torch.cat([lse_C.unsqueeze(1), top_C.unsqueeze(1), target_CK], 1)
    all_ranks = mine.new_empty(group.size() * mine.shape[0], mine.shape[1])
    dist.all_gather_into_tensor(all_ranks, mine, group=group)
    lse, top, target = all_ranks.view(group.size(), *mine.shape).split(
        [1, 1, target_CK.shape[1]], dim=2
    )
    return lse.squeeze(2).logsumexp(0), target.sum(0), top.squeeze(2).amax(0)


def _local_targets(targets: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return targets as rows of this shard (0 where elsewhere), and which of them are here."""
    local = targets - first_row
    here = (local >= 0) & (local < num_rows)
    return local.masked_fill(~here, 0), here


def _stats(logits_CV: Tensor, rows_CK: Tensor, here_CK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return this shard's log-sum-exp, its targets' logits (0 where elsewhere), its largest."""
    target = logits_CV.gather(1, rows_CK).masked_fill(~here_CK, 0.0)
    return logits_CV.logsumexp(1), target, logits_CV.detach().amax(1)


class _FrozenHead(torch.autograd.Function):
    """log p of targets under a weight that takes no gradient.

    d log p_t / d h_t = W[target_t] - sum_v p_tv W[v] does not depend on the loss, so it is formed
    while the chunk's logits are at hand; backward only scales it.  Two matrix products a chunk
    instead of three.  A cap on logits gives each W[v] the factor 1 - tanh(logit_tv / cap)^2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        rows_T: Tensor,
        here_T: Tensor,
        vocabulary: _Vocabulary,
    ) -> tuple[Tensor, Tensor]:
        size, cap = chunk_size(weight_VH.shape[0]), vocabulary.cap
        needs_grad = ctx.needs_input_grad[0]
        logps, is_top, jacobians = [], [], []
        for start in range(0, hidden_TH.shape[0], size):
            chunk = slice(start, start + size)
            h, r, i = hidden_TH[chunk], rows_T[chunk].unsqueeze(1), here_T[chunk].unsqueeze(1)
            logits, slope = (h @ weight_VH.T).float(), None
            if cap is not None:
                logits = logits.div_(cap).tanh_()
                slope = 1 - logits.square() if needs_grad else None
                logits.mul_(cap)
            logits[:, vocabulary.num_real :] = float("-inf")
            target = logits.gather(1, r).masked_fill(~i, 0.0)
            # A shard may be padding alone, and -inf - -inf is no number.
            top = logits.amax(1).clamp_min_(torch.finfo(torch.float32).min)
            p = logits.sub_(top.unsqueeze(1)).exp_()
            lse = top + p.sum(1).log()
            lse, target, largest = _combine(lse, target, top, vocabulary.group)
            logps.append(target.squeeze(1) - lse)
            is_top.append(target.squeeze(1) >= largest)
            if not needs_grad:
                continue
            # exp(top - lse) makes p a share of the whole vocabulary.  The target's 1 goes in before
            # the product: after it, half precision would lose what a confident token has left.
            p.mul_((top - lse).exp_().neg_().unsqueeze(1))
            p.scatter_add_(1, r, i.float())
            if slope is not None:
                p.mul_(slope)  # of the capped logit by the logit, which the weight gives
            jacobians.append(p.to(weight_VH.dtype) @ weight_VH)
        if needs_grad:
            ctx.save_for_backward(torch.cat(jacobians))
        tops = torch.cat(is_top)
        ctx.mark_non_differentiable(tops)
        return torch.cat(logps), tops

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (jacobian_TH,) = ctx.saved_tensors
        grad = grads[0].unsqueeze(1).to(jacobian_TH.dtype) * jacobian_TH
        return grad, None, None, None, None


class _CombineOverVocabulary(torch.autograd.Function):
    """Log-probabilities over all shards, with the gradient that each shard is owed."""

    @staticmethod
    def forward(
        ctx: Any,
        lse_C: Tensor,
        target_CK: Tensor,
        top_C: Tensor,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        lse, target, top = _combine(lse_C, target_CK, top_C, group)
        ctx.save_for_backward((lse_C - lse).exp())
        is_top = target[:, 0] >= top
        ctx.mark_non_differentiable(is_top)
        return target - lse.unsqueeze(1), is_top

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (share_C,) = ctx.saved_tensors
        return -grads[0].sum(1) * share_C, grads[0], None, None


def frozen_head_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    first_row: int = 0,
    num_real: int | None = None,
    group: dist.ProcessGroup | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log softmax(hidden W^T)[target] and whether no token is likelier.

    Float32 (T,) and bool (T,).  Collective over `group`.  With a `cap`, logits go through
    `soft_cap` first.
    `first_row` is the vocabulary index of the shard's first row; rows from `num_real` on are
    padding.  The gradient for `hidden_TH` is this shard's part: the caller sums it over `group`.
    """
    num_rows = weight_VH.shape[0]
    num_real = num_rows if num_real is None else num_real
    rows, here = _local_targets(targets_T, first_row, num_rows)
    vocabulary = _Vocabulary(num_real, group, cap)
    logps, is_top = _FrozenHead.apply(hidden_TH, weight_VH, rows, here, vocabulary)
    return logps, is_top


def logprobs(
    hidden_TH: Tensor,
    logits_of: LogitsFunction,
    targets_TK: Tensor,
    *,
    num_rows: int,
    first_row: int = 0,
    num_real: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the same as frozen_head_logprobs for any differentiable `logits_of`.

    Targets may be (T, K): log-probabilities are (T, K) then, and the second result, (T,), is about
    the first of them.  `logits_of` maps a chunk (C, H) to this shard's logits (C, V).  They are
    recomputed in backward, chunk by chunk.
    """
    num_real = num_rows if num_real is None else num_real
    rows, here = _local_targets(targets_TK.view(len(targets_TK), -1), first_row, num_rows)

    def chunk_stats(h: Tensor, r: Tensor, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits_of(h).float()
        if num_real < num_rows:
            logits = torch.cat(
                [logits[:, :num_real], torch.full_like(logits[:, num_real:], float("-inf"))], 1
            )
        return _stats(logits, r, i)

    parts, is_top = [], []
    size = chunk_size(num_rows)
    for start in range(0, hidden_TH.shape[0], size):
        c = slice(start, start + size)
        stats = checkpoint(chunk_stats, hidden_TH[c], rows[c], here[c], use_reentrant=False)
        logps, tops = _CombineOverVocabulary.apply(*stats, group)
        parts.append(logps)
        is_top.append(tops)
    return torch.cat(parts).view(targets_TK.shape), torch.cat(is_top)
