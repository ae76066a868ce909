"""The rotation in four passes is the rotation by definition, and so is its gradient."""

import pytest
import torch

from megatrain_kernels.rotary import rotate, rotate_reference


@pytest.mark.parametrize("rotated", [8, 16])
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_rotation_and_gradient_equal_the_definition(rotated, num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 3, 16, generator=generator, dtype=torch.float64)
    angles = torch.randn(num_tokens, 1, rotated, generator=generator, dtype=torch.float64)
    grad = torch.randn(num_tokens, 3, 16, generator=generator, dtype=torch.float64)
    # Both halves of a head turn by the same angles.
    angles[..., rotated // 2 :] = angles[..., : rotated // 2]
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    got = rotate(ours, angles.cos(), angles.sin())
    want = rotate_reference(theirs, angles.cos(), angles.sin())
    got.backward(grad)
    want.backward(grad)
    # Float64, the same products in another order.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-14)
