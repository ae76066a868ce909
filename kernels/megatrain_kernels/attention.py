"""Causal attention over packed sequences: grouped queries, sliding window, sinks, unequal sizes.

Shapes: T queries and S keys on this rank, H query heads, G key/value heads (H a multiple of G),
D the size of a query or key head, V of a value head.  Sequences never see each other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain_kernels.segments import Segment


def packed_attention(  # noqa: PLR0913 - every setting of one softmax
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    segments: tuple[Segment, ...],
    *,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return softmax(scale * q k^T) v per segment, shape (T, H, V), through torch's SDPA.

    `window` counts the keys before the query that it still sees (None: all of them).  `sinks_H`
    holds a logit per head that takes part in the softmax and has no value.  `softcap` c makes a
    logit x to c * tanh(x / c), which SDPA has not: such attention is written out.
    """
    # Split, not sliced one by one: the gradient of a slice is as long as the whole.
    queries = q_THD.split([s.num_queries for s in segments])
    keys, values = (_per_segment(x, segments) for x in (k_SGD, v_SGV))
    out = [
        _segment_attention(q, k, v, scale, window, sinks_H)
        if softcap is None
        else _capped_attention(q, k, v, scale, window, sinks_H, softcap)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(out) if len(out) > 1 else out[0]


def _per_segment(x_S: Tensor, segments: tuple[Segment, ...]) -> list[Tensor]:
    """Return the keys of each segment; segments of one sequence share a piece of the split."""
    longest: dict[int, int] = {}
    for s in segments:
        longest[s.k_start] = max(longest.get(s.k_start, 0), s.num_keys)
    starts = sorted(longest)
    ends = [*starts[1:], x_S.shape[0]]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    pieces = dict(zip(starts, x_S.split(sizes), strict=True))
    return [
        piece if piece.shape[0] == s.num_keys else piece[: s.num_keys]
        for s, piece in ((s, pieces[s.k_start]) for s in segments)
    ]


def _segment_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks_H: Tensor | None
) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    num_queries, num_keys = q.shape[2], k.shape[2]
    windowed = window is not None and window < num_keys - 1
    grouped = q.shape[1] != k.shape[1]
    if sinks_H is None and not windowed and num_queries == num_keys:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out[0].transpose(0, 1)
    mask = visible(num_queries, num_keys, window if windowed else None, device=q.device)
    if sinks_H is not None:
        k, v, mask = _with_sink(k, v, mask, sinks_H, dtype=q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def _capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    sinks_H: Tensor | None,
    softcap: float,
) -> Tensor:
    """Return the attention of one segment with soft-capped logits; softmax in float32."""
    groups = k.shape[1]
    q_TGRD = q.unflatten(1, (groups, -1))
    logits = torch.einsum("tgrd,sgd->grts", q_TGRD, k).float() * scale
    logits = softcap * torch.tanh(logits / softcap)
    mask = visible(q.shape[0], k.shape[0], window, device=q.device)
    logits = logits.masked_fill(~mask, float("-inf"))
    if sinks_H is not None:
        sink = sinks_H.float().view(groups, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    weights = logits.softmax(-1)[..., : k.shape[0]].to(v.dtype)
    return torch.einsum("grts,sgv->tgrv", weights, v).flatten(1, 2)


def visible(num_queries: int, num_keys: int, window: int | None, *, device: torch.device) -> Tensor:
    """Return a boolean mask (num_queries, num_keys): the last query is at the last key."""
    last = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    keys = torch.arange(num_keys, device=device)
    mask = keys <= last
    return mask if window is None else mask & (keys >= last - window)


def _with_sink(
    k: Tensor, v: Tensor, mask: Tensor, sinks_H: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Append a key whose logit is the sink (a zero key and a bias) and whose value is zero."""
    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    bias = bias.masked_fill(~mask, float("-inf"))
    heads, queries = sinks_H.shape[0], mask.shape[0]
    sink = sinks_H.to(dtype).view(heads, 1, 1).expand(heads, queries, 1)
    return k, v, torch.cat([bias.expand(heads, -1, -1), sink], -1).unsqueeze(0)


def packed_attention_reference(  # noqa: PLR0913 - the same
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    segments: tuple[Segment, ...],
    *,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Define packed_attention: one softmax per query and head, written out, in float32."""
    repeats = q_THD.shape[1] // k_SGD.shape[1]
    out = torch.zeros(*q_THD.shape[:2], v_SGV.shape[-1], dtype=v_SGV.dtype, device=q_THD.device)
    for s in segments:
        for i in range(s.num_queries):
            last = s.num_keys - s.num_queries + i
            first = 0 if window is None else max(0, last - window)
            keys = slice(s.k_start + first, s.k_start + last + 1)
            k, v = (x[keys].repeat_interleave(repeats, 1).float() for x in (k_SGD, v_SGV))
            logits = scale * torch.einsum("hd,khd->hk", q_THD[s.q_start + i].float(), k)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if sinks_H is not None:
                logits = torch.cat([logits, sinks_H.float().unsqueeze(1)], 1)
            weights = logits.softmax(-1)[:, : v.shape[0]]
            out[s.q_start + i] = torch.einsum("hk,khv->hv", weights, v).to(out.dtype)
    return out
