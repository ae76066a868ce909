"""SwiGLU in one function is SwiGLU by definition, and so is its gradient."""

import pytest
import torch

from megatrain_kernels.swiglu import swiglu, swiglu_reference


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (7, 1, 32)])
def test_value_and_gradient_equal_the_definition(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    got, want = swiglu(ours), swiglu_reference(theirs)
    grad = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    got.backward(grad)
    want.backward(grad)
    # Float64, the same products.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-14)
