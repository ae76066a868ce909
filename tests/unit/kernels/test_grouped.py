"""The grouped linear against one torch linear per expert."""

import pytest
import torch
from torch.nn.functional import linear

from megatrain_kernels.grouped import grouped_linear, grouped_linear_reference


@pytest.mark.parametrize(
    "counts", [[3, 4, 2], [0, 9, 0], [9, 0, 0], [0, 0, 9], [1, 0, 8], [0, 0, 0]], ids=str
)
@pytest.mark.parametrize("function", [grouped_linear, grouped_linear_reference])
def test_each_run_of_tokens_meets_its_own_expert(function, counts):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 6, requires_grad=True)
    weights = [torch.randn(5, 6, requires_grad=True) for _ in counts]
    out = function(x, weights, counts)
    expert_of = [e for e, count in enumerate(counts) for _ in range(count)]
    expected = torch.zeros(0, 5)
    if expert_of:
        expected = torch.stack([linear(x[t], weights[e]) for t, e in enumerate(expert_of)])
    # One dot product of six terms, in another order at worst.
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(out.square().sum(), weights)
    for gradient, count in zip(gradients, counts, strict=True):
        assert gradient.shape == (5, 6)
        assert bool(gradient.abs().sum() > 0) == bool(count)


def test_counts_that_do_not_add_up_are_an_error():
    with pytest.raises(RuntimeError):
        grouped_linear(torch.zeros(3, 2), [torch.zeros(2, 2)] * 2, [1, 1])
