"""Norms against the formulas that Transformers and torch write."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatrain_kernels.norm import layer_norm, rms_norm

X = torch.linspace(-3, 4, 5 * 32).sin().view(5, 32) * 7
WEIGHT = torch.linspace(0.5, 1.5, 32)
BIAS = torch.linspace(-1, 1, 32)
FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}


def test_rms_norm_is_that_of_transformers():
    theirs = LlamaRMSNorm(32, eps=1e-5)
    theirs.weight.data.copy_(WEIGHT)
    torch.testing.assert_close(rms_norm(X, WEIGHT, eps=1e-5), theirs(X), **FLOAT32)


def test_a_zero_centered_rms_norm_is_that_of_gemma():
    theirs = Gemma2RMSNorm(32, eps=1e-5)
    theirs.weight.data.copy_(WEIGHT - 1)
    ours = rms_norm(X, WEIGHT - 1, eps=1e-5, zero_centered=True)
    torch.testing.assert_close(ours, theirs(X), **FLOAT32)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["without bias", "with bias"])
def test_layer_norm_is_that_of_torch(bias):
    expected = torch.nn.functional.layer_norm(X, (32,), WEIGHT, bias, 1e-5)
    torch.testing.assert_close(layer_norm(X, WEIGHT, bias, eps=1e-5), expected, **FLOAT32)
    ours = layer_norm(X, WEIGHT - 1, bias, eps=1e-5, zero_centered=True)
    torch.testing.assert_close(ours, expected, **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    x, weight, bias = X.to(dtype), WEIGHT.to(dtype), BIAS.to(dtype)
    for ours, exact in (
        (rms_norm(x, weight, eps=1e-5), rms_norm(x.double().float(), weight.float(), eps=1e-5)),
        (
            layer_norm(x, weight, bias, eps=1e-5),
            layer_norm(x.float(), weight.float(), bias.float(), eps=1e-5),
        ),
    ):
        assert ours.dtype == dtype
        assert torch.equal(ours, exact.to(dtype))


def test_large_values_do_not_overflow_half_precision():
    x = torch.full((1, 32), 6e4, dtype=torch.float16)
    assert torch.equal(rms_norm(x, torch.ones(32, dtype=torch.float16), eps=1e-5), x / 6e4)
