"""Three functions of flash-linear-attention for Megatron's GatedDeltaNet, in plain torch.

They take the place of the names that Megatron could not import; where flash-linear-attention can
run (it needs a GPU), nothing is replaced.
"""

import logging
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from megatrain_kernels.causal_conv import causal_conv, l2_norm
from megatrain_kernels.delta_rule import packed_delta_rule

logger = logging.getLogger(__name__)

PACKAGE = "megatron.core.ssm.gated_delta_net"


def l2norm(x: Tensor, eps: float = 1e-6, **options: Any) -> Tensor:
    """Return x with rows of length one."""
    return l2_norm(x, eps=eps)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Return the activated convolution of x (B, S, D); packed (1, T, D) with cu_seqlens."""
    _no_state(initial_state, output_final_state)
    flat_TD = causal_conv(x.flatten(0, 1), weight, bias, _lengths(x, cu_seqlens))
    if activation in ("silu", "swish"):
        flat_TD = silu(flat_TD)
    elif activation is not None:
        raise ValueError(f"the torch back end's convolution has no activation {activation!r}")
    return flat_TD.view_as(x), None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return o (B, S, H, V) of q and k (B, S, H, K); packed with cu_seqlens, where B is 1."""
    _no_state(initial_state, output_final_state)
    if use_qk_l2norm_in_kernel:
        q, k = l2_norm(q), l2_norm(k)
    lengths = _lengths(q, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, flat_v, g, beta = (x.flatten(0, 1) for x in (q, k, v, g, beta))
    return packed_delta_rule(q, k, flat_v, g, beta, lengths, scale=scale).view_as(v), None


def _lengths(x: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    if cu_seqlens is None:
        return [x.shape[1]] * x.shape[0]
    return [int(n) for n in (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()]


def _no_state(initial_state: Tensor | None, output_final_state: bool) -> None:
    if initial_state is not None or output_final_state:
        raise ValueError("the torch back end's gated delta-net keeps no state between calls")


FUNCTIONS = (l2norm, causal_conv1d, chunk_gated_delta_rule)


def use_torch_delta_net() -> None:
    """Give GatedDeltaNet these functions, unless flash-linear-attention is there and can run."""
    common = sys.modules.get(f"{PACKAGE}.common")
    if common is None or common.__dict__["l2norm"] is l2norm:
        return
    if common.__dict__["HAVE_FLA"] and torch.cuda.is_available():
        return
    logger.info(
        "gated delta-nets run in plain torch: flash-linear-attention installed=%s, cuda=%s",
        common.__dict__["HAVE_FLA"],
        torch.cuda.is_available(),
    )
    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGE) and module is not None:
            for function in FUNCTIONS:
                if function.__name__ in module.__dict__:
                    module.__dict__[function.__name__] = function
    common.__dict__["HAVE_FLA"] = True
