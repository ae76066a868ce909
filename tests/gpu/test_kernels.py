"""Every op on CUDA against its plain definition on the CPU in float32."""

import pytest
import torch

from megatrain_kernels.attention import packed_attention, packed_attention_reference
from megatrain_kernels.grouped import grouped_linear, grouped_linear_reference
from megatrain_kernels.logprobs import frozen_head_logprobs, logprobs
from megatrain_kernels.norm import layer_norm, rms_norm
from megatrain_kernels.segments import segments

LENGTHS = [1, 7, 130, 16, 64, 38]
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""TF32 is off; bfloat16 has eight bits, and sums of unit size are rounded a few times."""
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def exact_products():
    old = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = old


def compare(ours, theirs, inputs, dtype):
    """Check `ours` on CUDA in dtype against `theirs` on the CPU in float32, with gradients."""
    rounded = [x.to(dtype) for x in inputs]
    results = []
    for function, device, kind in ((ours, "cuda", dtype), (theirs, "cpu", torch.float32)):
        leaves = [x.to(device=device, dtype=kind).detach().requires_grad_() for x in rounded]
        out = function(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
        gradients = torch.autograd.grad((out.float() * weights).sum(), leaves)
        results.append([x.detach().float().cpu() for x in (out, *gradients)])
    for a, b in zip(*results, strict=True):
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-6)
        assert error <= ROUNDING[dtype]


@DTYPES
@pytest.mark.parametrize("value_size", [64, 32])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_is_its_definition(dtype, value_size, window, with_sinks):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    inputs = [
        torch.randn(total, 4, 64),
        torch.randn(total, 2, 64),
        torch.randn(total, 2, value_size),
    ]
    if with_sinks:
        inputs.append(torch.randn(4))

    def run(function):
        return lambda q, k, v, sinks=None: function(
            q, k, v, segments(LENGTHS), scale=0.125, window=window, sinks_H=sinks
        )

    compare(run(packed_attention), run(packed_attention_reference), inputs, dtype)


@DTYPES
@pytest.mark.parametrize("counts", [[32, 0, 64, 16], [0, 0, 0, 8], [5, 3, 1, 0]], ids=str)
def test_the_grouped_linear_is_one_product_per_expert(dtype, counts):
    torch.manual_seed(0)
    inputs = [torch.randn(sum(counts), 64), *(torch.randn(48, 64) for _ in counts)]
    compare(
        lambda x, *weights: grouped_linear(x, weights, counts),
        lambda x, *weights: grouped_linear_reference(x, weights, counts),
        inputs,
        dtype,
    )


@DTYPES
@pytest.mark.parametrize("rank", [4, 8, 6], ids=lambda r: f"r{r}")
def test_the_grouped_linear_takes_the_ranks_that_lora_has(dtype, rank):
    torch.manual_seed(0)
    counts = [9, 0, 23]
    inputs = [torch.randn(32, 64), *(torch.randn(rank, 64) for _ in counts)]
    compare(
        lambda x, *weights: grouped_linear(x, weights, counts),
        lambda x, *weights: grouped_linear_reference(x, weights, counts),
        inputs,
        dtype,
    )


@DTYPES
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms_are_those_of_the_cpu(dtype, zero_centered):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(50, 256) * 5, torch.randn(256), torch.randn(256)

    def rms(x, w):
        return rms_norm(x, w, eps=1e-5, zero_centered=zero_centered)

    def layer(x, w, b):
        return layer_norm(x, w, b, eps=1e-5, zero_centered=zero_centered)

    compare(rms, rms, [x, weight], dtype)
    compare(layer, layer, [x, weight, bias], dtype)


@DTYPES
@pytest.mark.parametrize("head", ["frozen", "general"])
def test_log_probabilities_are_log_softmax(dtype, head):
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 64), torch.randn(1000, 64) / 8
    targets = torch.randint(0, 1000, (70,))

    def ours(h):
        w, t = weight.to(h), targets.to(h.device)
        if head == "frozen":
            return frozen_head_logprobs(h, w, t)[0]
        return logprobs(h, lambda x: x @ w.T, t, num_rows=1000)[0]

    def theirs(h):
        w = weight.to(dtype).float()
        return torch.log_softmax(h @ w.T, -1).gather(1, targets[:, None])[:, 0]

    compare(ours, theirs, [hidden], dtype)
