"""Attention with soft-capped logits against its definition and Gemma 2 in Transformers."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from megatrain_kernels.attention import packed_attention, packed_attention_reference
from megatrain_kernels.segments import segments

TOLERANCE = 1e-5


def tensors(tokens: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 4, 8), (tokens, 2, 8), (tokens, 2, 6))
    return [(4 * torch.randn(*shape, generator=make)).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("has_sinks", [False, True], ids=["without sinks", "with sinks"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 9], [127]], ids=str)
def test_it_is_the_definition_forward_and_backward(lengths, window, has_sinks):
    given = tensors(sum(lengths))
    sinks = torch.linspace(-2, 2, 4) if has_sinks else None
    options = {"scale": 0.5, "window": window, "sinks_H": sinks, "softcap": 3.0}
    results = []
    for function in (packed_attention, packed_attention_reference):
        out = function(*given, segments(lengths), **options)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), given)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)


def test_it_is_that_of_gemma():
    q, k, _ = (x.detach() for x in tensors(7))
    v = k.flip(0)
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.head_dim = 2, 8
    mask = torch.full((7, 7), float("-inf")).triu(1)[None, None]
    theirs, _ = eager_attention_forward(
        layer, *(x.transpose(0, 1)[None] for x in (q, k, v)), mask, scaling=0.5, softcap=3.0
    )
    ours = packed_attention(q, k, v, segments([7]), scale=0.5, softcap=3.0)
    torch.testing.assert_close(ours, theirs[0], rtol=0, atol=TOLERANCE)
