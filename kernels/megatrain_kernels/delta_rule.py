"""The gated delta rule of linear attention (Gated DeltaNet), in chunks, over packed sequences.

S tokens, H heads, K size of queries and keys, V size of values, C tokens in a chunk, N chunks.

    M_t = exp(g_t) M_{t-1} + beta_t k_t (v_t - exp(g_t) M_{t-1}^T k_t)^T       M (K, V), M_0 = 0
    o_t = scale * M_t^T q_t

Source: Yang et al., arXiv:2412.06464.  The chunk's own terms solve one triangular system.
"""

import torch
from torch import Tensor

CHUNK = 64


def delta_rule_reference(
    q_SHK: Tensor, k_SHK: Tensor, v_SHV: Tensor, g_SH: Tensor, beta_SH: Tensor, *, scale: float
) -> Tensor:
    """Return o_SHV of one sequence, token by token in float32: the definition."""
    state_HKV = v_SHV.new_zeros(q_SHK.shape[1], q_SHK.shape[2], v_SHV.shape[2]).float()
    out = []
    for q_HK, k_HK, v_HV, g_H, beta_H in zip(
        *(x.float() for x in (q_SHK, k_SHK, v_SHV, g_SH, beta_SH)), strict=True
    ):
        state_HKV = state_HKV * g_H.exp()[:, None, None]
        error_HV = (v_HV - torch.einsum("hkv,hk->hv", state_HKV, k_HK)) * beta_H[:, None]
        state_HKV = state_HKV + torch.einsum("hk,hv->hkv", k_HK, error_HV)
        out.append(scale * torch.einsum("hkv,hk->hv", state_HKV, q_HK))
    return torch.stack(out).to(v_SHV.dtype) if out else v_SHV.clone()


def delta_rule(
    q_SHK: Tensor, k_SHK: Tensor, v_SHV: Tensor, g_SH: Tensor, beta_SH: Tensor, *, scale: float
) -> Tensor:
    """Return o_SHV of one sequence; the same in chunks, in float32."""
    length = q_SHK.shape[0]
    if not length:
        return v_SHV.clone()
    padding = -length % CHUNK
    q, k, v, g, beta = (
        _chunks(x.float(), padding) for x in (q_SHK * scale, k_SHK, v_SHV, g_SH, beta_SH)
    )
    decay_HNC = g.cumsum(-1)
    # exp of what is above the diagonal may overflow: it is masked before and after.
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (decay_HNC[..., :, None] - decay_HNC[..., None, :]).masked_fill(later, 0).exp()
    between_HNCC = between.masked_fill(later, 0)
    k_beta = k * beta[..., None]
    system = (k_beta @ k.mT * between_HNCC).tril(-1)
    system = system + torch.eye(CHUNK, device=q.device)
    wanted = torch.cat([v * beta[..., None], k_beta * decay_HNC[..., None].exp()], -1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    value_HNCV, key_HNCK = solved.split([v.shape[-1], k.shape[-1]], -1)
    within_HNCC = (q @ k.mT) * between_HNCC
    out = _over_chunks(q, k, value_HNCV, key_HNCK, decay_HNC, within_HNCC)
    return out.flatten(1, 2).transpose(0, 1)[:length].to(v_SHV.dtype)


def _chunks(x: Tensor, padding: int) -> Tensor:
    """Return (S, H, ...) as (H, N, C, ...), filled with zeros at the end."""
    filler = x.new_zeros(padding, *x.shape[1:])
    return torch.cat([x, filler]).transpose(0, 1).unflatten(1, (-1, CHUNK))


def _over_chunks(
    q: Tensor, k: Tensor, value: Tensor, key: Tensor, decay: Tensor, within: Tensor
) -> Tensor:
    """Carry the state from chunk to chunk; return o (H, N, C, V)."""
    state_HKV = q.new_zeros(q.shape[0], q.shape[-1], value.shape[-1])
    out = []
    for n in range(q.shape[1]):
        new_HCV = value[:, n] - key[:, n] @ state_HKV
        seen_HCV = (q[:, n] * decay[:, n, :, None].exp()) @ state_HKV
        out.append(seen_HCV + within[:, n] @ new_HCV)
        last_H1 = decay[:, n, -1:]
        left_HCK = k[:, n] * (last_H1 - decay[:, n]).exp()[..., None]
        state_HKV = state_HKV * last_H1[..., None].exp() + left_HCK.mT @ new_HCV
    return torch.stack(out, 1)


def packed_delta_rule(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    lengths: list[int],
    *,
    scale: float,
) -> Tensor:
    """Return o_THV of packed sequences of these lengths, each on its own."""
    parts = (x.split(lengths) for x in (q_THK, k_THK, v_THV, g_TH, beta_TH))
    return torch.cat([delta_rule(*one, scale=scale) for one in zip(*parts, strict=True)])
