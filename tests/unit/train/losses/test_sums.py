"""What holds for every loss: sums over micro-batches, micro-batches without data, dtypes."""

from dataclasses import replace

import pytest
import torch

from megatrain.train.loss import LossBatch
from megatrain.train.losses import (
    CISPOLoss,
    CrossEntropyLoss,
    DistillationLoss,
    DPOLoss,
    DROLoss,
    GRPOLoss,
    GSPOLoss,
    ImportanceSamplingLoss,
    KTOLoss,
    MPOLoss,
    ORPOLoss,
    PPOLoss,
    RewardModelLoss,
    SimPOLoss,
)

LENGTHS = [3, 7, 1, 5, 4, 2, 6, 1]
TOP = 3
LOSSES = [
    CrossEntropyLoss(),
    ImportanceSamplingLoss(),
    PPOLoss(),
    CISPOLoss(),
    DROLoss(),
    GSPOLoss(clip_low_threshold=0.8, clip_high_threshold=1.2),
    GRPOLoss(beta=0.1),
    GRPOLoss(loss_type="grpo", importance_sampling_level="sequence"),
    GRPOLoss(loss_type="dr_grpo", max_completion_length=9, delta=3.0),
    DPOLoss(sft_weight=0.5),
    DPOLoss(loss_type="ipo", reference_free=True),
    SimPOLoss(),
    ORPOLoss(),
    MPOLoss(),
    KTOLoss(),
    KTOLoss(kl=0.3),
    RewardModelLoss(center_rewards_coefficient=0.1),
    DistillationLoss(sft_weight=0.1),
]
pytestmark = pytest.mark.parametrize(
    "loss", LOSSES, ids=[f"{i}-{type(each).__name__}" for i, each in enumerate(LOSSES)]
)


def whole_batch(loss, dtype=torch.float64):
    """Return a batch with all that the loss asks for, optional inputs included, but weights."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    size, sequences = sum(LENGTHS), len(LENGTHS)
    logps_N = (-numbers(size).abs() - 0.1).requires_grad_()
    near_N = logps_N.detach() + 0.3 * numbers(size)
    top_NK = numbers(size, TOP + 2).log_softmax(-1)[:, :TOP]
    inputs = {
        "old_logps": near_N,
        "ref_logps": near_N.flip(0),
        "advantages": numbers(size),
        "weights": numbers(size),
        "sequence_ratio_mask": (numbers(size) > -0.5).to(dtype),
        "clip_low_threshold": torch.full((size,), 0.7, dtype=dtype),
        "clip_high_threshold": torch.full((size,), 1.3, dtype=dtype),
        "label": (numbers(sequences) > 0).to(dtype),
        "kl": torch.full((sequences,), 0.2, dtype=dtype),
        "margin": numbers(sequences).abs(),
        "teacher_logps": top_NK,
        "teacher_tokens": torch.zeros(size, TOP, dtype=torch.int64),
    }
    owner_N = torch.arange(sequences).repeat_interleave(torch.tensor(LENGTHS))
    return LossBatch(
        logps_N,
        owner_N,
        sequences,
        {name: inputs[name] for name in loss.inputs},
        top_logps_NK=numbers(size, TOP + 2).log_softmax(-1)[:, :TOP].requires_grad_(),
        scores_S=numbers(sequences).requires_grad_(),
    )


def part(batch, loss, first, last):
    """Return sequences first to last - 1 of a batch, with the same leaves."""
    kept = (batch.sequence_N >= first) & (batch.sequence_N < last)
    inputs = {
        name: value[first:last] if loss.inputs[name].kind == "sequence" else value[kept]
        for name, value in batch.inputs.items()
    }
    return replace(
        batch,
        logps_N=batch.logps_N[kept],
        sequence_N=batch.sequence_N[kept] - first,
        num_sequences=last - first,
        inputs=inputs,
        top_logps_NK=batch.top_logps_NK[kept],
        scores_S=batch.scores_S[first:last],
    )


def leaves(batch):
    return [batch.logps_N, batch.top_logps_NK, batch.scores_S]


def gradients(total, batch):
    found = torch.autograd.grad(total, leaves(batch), allow_unused=True)
    return [
        torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves(batch), strict=True)
    ]


def test_micro_batches_add_up_to_the_batch(loss):
    batch = whole_batch(loss)
    whole, statistics = loss(batch)
    parts = [loss(part(batch, loss, *cut)) for cut in ((0, 2), (2, 6), (6, 8))]
    total = sum(value for value, _ in parts)
    # Float64: only the order of sums differs.
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    pairs = zip(gradients(total, batch), gradients(whole, batch), strict=True)
    for split, together in pairs:
        torch.testing.assert_close(split, together, rtol=1e-10, atol=1e-12)
    for name, (sum_, count) in statistics.items():
        assert float(count) > 0
        # Statistics are float32 sums.
        assert sum(float(s[name][0]) for _, s in parts) == pytest.approx(float(sum_), rel=1e-5)
        assert sum(float(s[name][1]) for _, s in parts) == float(count)
    divisors = [loss.divisor(LENGTHS[a:b]) for a, b in ((0, 2), (2, 6), (6, 8))]
    assert sum(divisors) == loss.divisor(LENGTHS) > 0


def test_statistics_are_those_that_the_loss_names_and_carry_no_gradient(loss):
    _, statistics = loss(whole_batch(loss))
    assert set(statistics) == set(loss.statistics)
    assert not any(torch.as_tensor(x).requires_grad for pair in statistics.values() for x in pair)


def test_a_micro_batch_without_data_is_a_zero_in_the_graph(loss):
    batch = whole_batch(loss)
    total, statistics = loss(part(batch, loss, 0, 0))
    assert total.shape == ()
    assert float(total.detach()) == 0
    assert total.requires_grad
    assert all((g == 0).all() for g in gradients(total, batch))
    assert set(statistics) == set(loss.statistics)
    assert all(float(x) == 0 for pair in statistics.values() for x in pair)


def test_sequences_without_labels_count_and_stay_finite(loss):
    """The first unit has no labels at all, as after truncation."""
    batch = whole_batch(loss)
    kept = batch.sequence_N >= 2
    inputs = {
        name: value if loss.inputs[name].kind == "sequence" else value[kept]
        for name, value in batch.inputs.items()
    }
    cut = replace(
        batch,
        logps_N=batch.logps_N[kept],
        sequence_N=batch.sequence_N[kept],
        inputs=inputs,
        top_logps_NK=batch.top_logps_NK[kept],
    )
    total, statistics = loss(cut)
    assert torch.isfinite(total)
    assert all(torch.isfinite(g).all() for g in gradients(total, batch))
    assert all(torch.isfinite(torch.as_tensor(s)) for s, _ in statistics.values())


def test_float32_stays_float32_and_agrees_with_float64(loss):
    single, double = whole_batch(loss, torch.float32), whole_batch(loss)
    ours, exact = loss(single)[0], loss(double)[0]
    assert ours.dtype == torch.float32
    # 29 labels, each with a few roundings of 6e-8 on terms of order 1.
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(ours, single), gradients(exact, double), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
