"""Sums over sequences: exact, with gradient, and linear in the labels."""

import numpy as np
import torch

from megatrain.train.losses.sums import label_counts, sequence_sums


def test_sums_and_counts_of_many_sequences_some_without_labels():
    """A mask of labels by sequences would be 5e9 entries here."""
    rng = np.random.default_rng(0)
    num_sequences, num_labels = 50_000, 100_000
    members = np.sort(rng.integers(0, num_sequences, num_labels))
    values = torch.tensor(rng.standard_normal(num_labels), dtype=torch.float32, requires_grad=True)
    sequence = torch.from_numpy(members)
    sums = sequence_sums(values, sequence, num_sequences)
    exact = np.bincount(members, weights=values.detach().double(), minlength=num_sequences)
    torch.testing.assert_close(sums, torch.from_numpy(exact).float(), rtol=0, atol=1e-6)
    counts = np.bincount(members, minlength=num_sequences)
    assert (counts == 0).any()
    assert label_counts(sequence, num_sequences).tolist() == np.maximum(counts, 1).tolist()
    weights = torch.arange(num_sequences, dtype=torch.float32)
    (gradient,) = torch.autograd.grad((sums * weights).sum(), values)
    assert torch.equal(gradient, weights[sequence])


def test_a_long_sequence_loses_no_digits():
    values = torch.full((1_000_000,), 0.1)
    (total,) = sequence_sums(values, torch.zeros(1_000_000, dtype=torch.int64), 1)
    assert abs(float(total) - 1e6 * float(values[0])) < 0.01
