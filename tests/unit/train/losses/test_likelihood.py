"""Cross-entropy against torch's on the logits, in value and gradient."""

import math

import pytest
import torch

from megatrain.train.losses import CrossEntropyLoss, cross_entropy
from tests.unit.train.losses.batches import (
    assert_same,
    log_probabilities,
    make_batch,
    ragged,
    reference_value_and_gradient,
    value_and_gradient,
)

LENGTHS = [3, 7, 1]
POLICY = log_probabilities(LENGTHS, seed=0)


def test_the_mean_over_labels_is_torch_s_cross_entropy():
    logits = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(11) % 5
    mine, torchs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logps = mine.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    value = cross_entropy(logps, torch.ones(11, dtype=torch.float64)) / 11
    expected = torch.nn.functional.cross_entropy(torchs, targets)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, torchs.grad)


def test_without_weights_every_label_counts_once():
    ones = [[1.0] * n for n in LENGTHS]
    expected = value_and_gradient(CrossEntropyLoss(), make_batch(POLICY, weights=ones))
    assert_same(value_and_gradient(CrossEntropyLoss(), make_batch(POLICY)), expected)


def test_weights_may_have_any_sign_and_do_not_change_the_divisor():
    weights = ragged(LENGTHS, seed=1, scale=10.0)

    def by_hand(logps):
        terms = [w * logps[i, t] for i, row in enumerate(weights) for t, w in enumerate(row)]
        return -sum(terms) / sum(LENGTHS)

    batch = make_batch(POLICY, weights=weights)
    expected = reference_value_and_gradient(by_hand, POLICY)
    assert_same(value_and_gradient(CrossEntropyLoss(), batch), expected)


def test_an_impossible_label_of_weight_0_takes_no_part():
    batch = make_batch([[-math.inf, -1.0]], weights=[[0.0, 2.0]])
    total, _ = CrossEntropyLoss()(batch)
    (gradient,) = torch.autograd.grad(total, batch.logps_N)
    assert float(total.detach()) == pytest.approx(2.0)
    assert gradient.tolist() == [0.0, -2.0]
