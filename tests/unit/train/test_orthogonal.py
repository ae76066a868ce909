"""Newton-Schulz on stacked matrices is torch.optim.Muon's on each."""

import pytest
import torch

from megatrain.train.orthogonal import newton_schulz, scale_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16), (1, 7)], ids=str)
def test_singular_values_follow_the_polynomial(shape):
    updates = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    found = newton_schulz(updates, COEFFICIENTS, steps=5, eps=1e-7, dtype=torch.float64)
    for update, result in zip(updates, found, strict=True):
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        s = s / update.norm()
        for _ in range(5):
            s = COEFFICIENTS[0] * s + COEFFICIENTS[1] * s**3 + COEFFICIENTS[2] * s**5
        # The same polynomial on matrices and on singular values, in float64.
        assert torch.allclose(result, u @ s.diag() @ vh, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)], ids=str)
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_one_step_is_torchs(shape, adjust):
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(shape, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = update
    options = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    torch.optim.Muon([weight], adjust_lr_fn=adjust, **options).step()
    found = newton_schulz(update[None], COEFFICIENTS, steps=5, eps=1e-7, dtype=torch.bfloat16)[0]
    ours = found.float() * scale_of(shape, adjust)
    # bfloat16 keeps 8 bits; sums in another order flip the last, five times over.
    error = (ours + weight.detach()).norm() / weight.detach().norm()
    assert float(error) <= 0.02


def test_zero_stays_zero():
    found = newton_schulz(
        torch.zeros(2, 3, 4), COEFFICIENTS, steps=5, eps=1e-7, dtype=torch.float32
    )
    assert not found.any()
