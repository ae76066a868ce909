"""Deltas of many adapters: the definition against one after the other, Triton against it."""

import os
import subprocess
import sys

import pytest
import torch

from megatrain_kernels.multi_lora import expand_reference, shrink, shrink_reference

COUNTS = [5, 0, 40, 3]
RANKS = [1, 4, 64, None]


def _factors(rows: int, columns: int) -> tuple[list, list]:
    a = [None if r is None else torch.randn(r, columns, requires_grad=True) for r in RANKS]
    b = [None if r is None else torch.randn(rows, r, requires_grad=True) for r in RANKS]
    return a, b


def test_each_run_has_the_delta_of_its_own_factors():
    torch.manual_seed(0)
    x, out = torch.randn(48, 24), torch.randn(48, 16)
    a, b = _factors(16, 24)
    h = shrink(x, a, COUNTS, 64)
    assert h.shape == (48, 64)
    result = expand_reference(out, h, b, COUNTS)
    expected = out.clone()
    expected[:5] += x[:5] @ a[0].T @ b[0].T
    expected[5:45] += x[5:45] @ a[2].T @ b[2].T
    # Values of about 100, and the same sums in another order.
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-6)
    result.sum().backward()
    assert a[1].grad is None or not a[1].grad.any()
    assert a[2].grad.any()


def test_a_run_without_an_adapter_is_left_as_it_is():
    x, out = torch.randn(3, 24), torch.randn(3, 16)
    h = shrink_reference(x, [None], [3], 8)
    assert not h.any()
    assert torch.equal(expand_reference(out, h, [None], [3]), out)


INTERPRETED = """
import torch
from megatrain_kernels.multi_lora_triton import grouped_matmul
torch.manual_seed(0)
# numpy, which interprets, has no bfloat16.  Bounds: units in the last place of the largest entry.
for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
    counts = [5, 0, 40, 33]
    x = torch.randn(78, 37).to(dtype).requires_grad_()
    w = torch.randn(4, 37, 70).to(dtype).requires_grad_()
    out = grouped_matmul(x, w, counts)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, w), grad)
    plain = torch.cat([p @ m for p, m in zip(x.split(counts), w)])
    expected = torch.autograd.grad(plain, (x, w), grad)
    for ours, theirs in zip((out, *got), (plain, *expected)):
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max(), (dtype, bound)
print("the same")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux")
@pytest.mark.slow
def test_triton_computes_the_definition_in_its_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "the same", done.stderr
