"""Log-probabilities in chunks against torch's log_softmax of whole logits, with gradients."""

import pytest
import torch

from megatrain_kernels import logprobs as module
from megatrain_kernels.logprobs import chunk_size, frozen_head_logprobs, logprobs, soft_cap

T, H, V = 37, 16, 51
TOLERANCE = 2e-6


@pytest.fixture
def problem():
    torch.manual_seed(0)
    hidden = torch.randn(T, H, requires_grad=True)
    weight = torch.randn(V, H)
    targets = torch.randint(0, V, (T,))
    return hidden, weight, targets


def naive(hidden, weight, targets):
    return torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]


def value_and_gradient(logps, *inputs):
    weights = torch.linspace(-1, 2, len(logps))
    return [logps.detach(), *torch.autograd.grad((logps * weights).sum(), inputs)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=TOLERANCE)


@pytest.mark.parametrize("tokens_per_chunk", [1, 5, 16, 1000])
def test_a_frozen_head_gives_log_softmax_and_its_gradient(problem, monkeypatch, tokens_per_chunk):
    hidden, weight, targets = problem
    monkeypatch.setattr(module, "chunk_size", lambda rows: tokens_per_chunk)
    ours = value_and_gradient(frozen_head_logprobs(hidden, weight, targets)[0], hidden)
    assert_same(ours, value_and_gradient(naive(hidden, weight, targets), hidden))


@pytest.mark.parametrize("tokens_per_chunk", [1, 5, 16, 1000])
def test_a_general_head_gives_log_softmax_and_all_gradients(problem, monkeypatch, tokens_per_chunk):
    hidden, weight, targets = problem
    weight.requires_grad_()
    monkeypatch.setattr(module, "chunk_size", lambda rows: tokens_per_chunk)
    logps, _ = logprobs(hidden, lambda h: h @ weight.T, targets, num_rows=V)
    ours = value_and_gradient(logps, hidden, weight)
    assert_same(ours, value_and_gradient(naive(hidden, weight, targets), hidden, weight))


def test_rows_of_padding_take_no_part(problem):
    hidden, weight, targets = problem
    padded = torch.cat([weight, torch.full((13, H), 50.0)])
    expected = value_and_gradient(naive(hidden, weight, targets), hidden)
    frozen, _ = frozen_head_logprobs(hidden, padded, targets, num_real=V)
    assert_same(value_and_gradient(frozen, hidden), expected)
    general, _ = logprobs(hidden, lambda h: h @ padded.T, targets, num_rows=V + 13, num_real=V)
    assert_same(value_and_gradient(general, hidden), expected)


CAP = 3.0
"""Logits here reach 12: some are far beyond it, where the slope is nearly nothing."""


def capped(hidden, weight, targets):
    logits = torch.tanh(hidden @ weight.T / CAP) * CAP
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("tokens_per_chunk", [5, 1000])
@pytest.mark.parametrize("padding", [0, 13])
def test_a_cap_on_logits_is_in_values_and_gradients(
    problem, monkeypatch, tokens_per_chunk, padding
):
    hidden, weight, targets = problem
    weight.requires_grad_()
    monkeypatch.setattr(module, "chunk_size", lambda rows: tokens_per_chunk)
    expected = value_and_gradient(capped(hidden, weight, targets), hidden, weight)
    uncapped = value_and_gradient(naive(hidden, weight, targets), hidden, weight)
    assert all((a - b).abs().max() > 0.1 for a, b in zip(expected, uncapped, strict=True))

    padded = torch.cat([weight, torch.full((padding, H), 50.0)])
    frozen, _ = frozen_head_logprobs(hidden, padded.detach(), targets, num_real=V, cap=CAP)
    assert_same(value_and_gradient(frozen, hidden), expected[:2])
    general, _ = logprobs(
        hidden, lambda h: soft_cap(h @ padded.T, CAP), targets, num_rows=V + padding, num_real=V
    )
    assert_same(value_and_gradient(general, hidden, weight), expected)


def test_without_gradients_nothing_is_kept(problem):
    hidden, weight, targets = problem
    with torch.no_grad():
        logps, _ = frozen_head_logprobs(hidden, weight, targets)
    assert not logps.requires_grad
    torch.testing.assert_close(
        logps, naive(hidden, weight, targets).detach(), rtol=0, atol=TOLERANCE
    )


def test_half_precision_hidden_states_give_float32_log_probabilities(problem):
    hidden, weight, targets = (x.bfloat16() if x.is_floating_point() else x for x in problem)
    logps, _ = frozen_head_logprobs(hidden, weight, targets)
    assert logps.dtype == torch.float32
    # The logits are rounded to bfloat16: 8 bits of values up to 16.
    expected = naive(hidden.float(), weight.float(), targets)
    torch.testing.assert_close(logps, expected, rtol=0, atol=0.1)


def test_several_targets_a_token_give_their_log_softmax_and_all_gradients(problem):
    hidden, weight, _ = problem
    weight.requires_grad_()
    targets = torch.randint(V, (len(hidden), 3), generator=torch.Generator().manual_seed(2))
    ours, _ = logprobs(hidden, lambda h: h @ weight.T, targets, num_rows=V)
    theirs = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets)
    factors = torch.linspace(-1, 2, targets.numel()).view(targets.shape)
    for a, b in zip(
        torch.autograd.grad((ours * factors).sum(), (hidden, weight)),
        torch.autograd.grad((theirs * factors).sum(), (hidden, weight)),
        strict=True,
    ):
        # Three times as many terms add up as for one target.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=3 * TOLERANCE)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=TOLERANCE)


def test_a_head_says_whether_its_target_is_the_likeliest_token(problem):
    hidden, weight, targets = problem
    best = (hidden @ weight.T).argmax(-1)
    targets = torch.where(torch.arange(len(targets)) % 2 == 0, best, targets)
    expected = targets == best
    assert expected.any()
    assert not expected.all()
    assert torch.equal(frozen_head_logprobs(hidden, weight, targets)[1], expected)
    general = logprobs(hidden, lambda h: h @ weight.T, targets, num_rows=V)
    assert torch.equal(general[1], expected)


def test_a_chunk_of_logits_has_a_bounded_size():
    assert chunk_size(152_000) * 152_000 <= module.LOGITS_PER_CHUNK
    assert chunk_size(10**9) == 16
    assert chunk_size(0) > 0
