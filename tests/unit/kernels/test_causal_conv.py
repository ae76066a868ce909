"""The causal convolution of packed sequences against its definition."""

import pytest
import torch

from megatrain_kernels.causal_conv import causal_conv, causal_conv_reference, l2_norm

CHANNELS = 6


def tensors(tokens: int, width: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, CHANNELS), (CHANNELS, width), (CHANNELS,))
    return [torch.randn(*shape, generator=make).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("has_bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("lengths", [[1], [127], [3, 1, 5], [2, 4, 0, 127, 1]], ids=str)
def test_it_is_the_definition_forward_and_backward(lengths, width, has_bias):
    x, weight, bias = tensors(sum(lengths), width)
    given = [x, weight, bias] if has_bias else [x, weight]
    results = []
    for function in (causal_conv, causal_conv_reference):
        wanted = [n for n in lengths if n] if function is causal_conv_reference else lengths
        out = function(x, weight, bias if has_bias else None, wanted)
        scale = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out, *torch.autograd.grad((out * scale).sum(), given)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_no_tokens_give_no_tokens():
    x, weight, bias = tensors(0, 4)
    assert causal_conv(x, weight, bias, [0]).shape == (0, CHANNELS)


def test_bfloat16_is_near_float32():
    x, weight, bias = (t.detach().bfloat16() for t in tensors(30, 4))
    ours = causal_conv(x, weight, bias, [20, 10])
    exact = causal_conv_reference(x.float(), weight.float(), bias.float(), [20, 10])
    torch.testing.assert_close(ours.float(), exact, rtol=2e-2, atol=5e-2)


def test_rows_have_length_one():
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(l2_norm(x), torch.nn.functional.normalize(x, dim=-1))
    assert l2_norm(x.bfloat16()).dtype == torch.bfloat16
