"""Packed attention against its definition: one softmax per query and head, written out."""

import random

import pytest
import torch

from megatrain_kernels.attention import packed_attention, packed_attention_reference, visible
from megatrain_kernels.segments import key_order, local_positions, segments

LENGTHS = [1, 7, 2, 16, 5, 1]
TOLERANCE = 2e-6
"""Float32 sums of up to 16 terms of size one, in another order."""


def tensors(total, *, heads=4, groups=2, size=8, value_size=8, seed=0):
    torch.manual_seed(seed)
    shapes = ((heads, size), (groups, size), (groups, value_size))
    return [torch.randn(total, *shape, requires_grad=True) for shape in shapes]


CASES = {
    "plain": {},
    "one key head for all": {"groups": 1},
    "as many key heads": {"groups": 4},
    "values of another size": {"size": 12, "value_size": 8},
    "larger values": {"size": 4, "value_size": 10},
    "window of no other key": {"window": 0},
    "window of three": {"window": 3},
    "window longer than anything": {"window": 100},
    "window that just does not fit": {"window": 14},
    "window that just fits": {"window": 15},
    "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "window": 3},
    "sinks and values of another size": {"sinks": True, "value_size": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_definition(case):
    options = dict(CASES[case])
    window = options.pop("window", None)
    sinks = torch.randn(4, requires_grad=True) if options.pop("sinks", False) else None
    qkv = tensors(sum(LENGTHS), **options)
    inputs = [*qkv, *([] if sinks is None else [sinks])]
    results = []
    for function in (packed_attention, packed_attention_reference):
        out = function(*qkv, segments(LENGTHS), scale=0.37, window=window, sinks_H=sinks)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_ranks_of_context_parallelism_together_give_what_one_rank_gives(
    cp_size, window, with_sinks
):
    unit = 2 * cp_size
    lengths = [unit, 3 * unit, unit, 2 * unit]
    q, k, v = tensors(sum(lengths))
    sinks = torch.randn(4) if with_sinks else None
    options = {"scale": 0.3, "window": window, "sinks_H": sinks}
    expected = packed_attention_reference(q, k, v, segments(lengths), **options)
    order = torch.tensor(key_order(lengths, cp_size=cp_size))
    mine = [
        torch.tensor(local_positions(lengths, cp_size=cp_size, cp_rank=rank))
        for rank in range(cp_size)
    ]
    gathered = torch.cat(mine)[order]
    assert torch.equal(gathered, torch.arange(sum(lengths)))
    for rank, index in enumerate(mine):
        pieces = segments(lengths, cp_size=cp_size, cp_rank=rank)
        actual = packed_attention(q[index], k[gathered], v[gathered], pieces, **options)
        torch.testing.assert_close(actual, expected[index], rtol=0, atol=TOLERANCE)


def test_sequences_do_not_see_each_other():
    q, k, v = (x.detach() for x in tensors(12))
    before = packed_attention(q, k, v, segments([5, 7]), scale=0.3)
    k[:5], v[:5] = 100.0, -100.0
    after = packed_attention(q, k, v, segments([5, 7]), scale=0.3)
    assert torch.equal(before[5:], after[5:])
    assert not torch.equal(before[:5], after[:5])


def test_a_sink_of_minus_infinity_is_no_sink():
    q, k, v = tensors(9)
    sinks = torch.full((4,), float("-inf"))
    with_sinks = packed_attention(q, k, v, segments([9]), scale=0.3, sinks_H=sinks)
    without = packed_attention(q, k, v, segments([9]), scale=0.3)
    torch.testing.assert_close(with_sinks, without, rtol=0, atol=TOLERANCE)


def test_the_last_query_is_at_the_last_key():
    device = torch.device("cpu")
    assert visible(2, 4, None, device=device).tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]
    assert visible(2, 4, 1, device=device).tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]


def test_every_token_is_on_one_rank_and_sees_what_comes_before_it_in_its_own_sequence():
    rng = random.Random(0)
    for _ in range(50):
        cp_size = rng.randint(1, 5)
        unit = 2 * cp_size if cp_size > 1 else 1
        lengths = [unit * rng.randint(1, 4) for _ in range(rng.randint(1, 5))]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        sees = {}
        for rank in range(cp_size):
            positions = local_positions(lengths, cp_size=cp_size, cp_rank=rank)
            if cp_size == 1:
                positions = list(range(sum(lengths)))
            pieces = segments(lengths, cp_size=cp_size, cp_rank=rank)
            assert sum(s.num_queries for s in pieces) == len(positions)
            for s in pieces:
                for i in range(s.num_queries):
                    last = s.num_keys - s.num_queries + i
                    sees[positions[s.q_start + i]] = range(s.k_start, s.k_start + last + 1)
        assert sees == {
            start + i: range(start, start + i + 1)
            for start, length in zip(starts, lengths, strict=True)
            for i in range(length)
        }


def test_context_parallel_ranks_have_the_same_causal_work():
    for cp_size in (2, 3, 4, 8):
        lengths = [2 * cp_size * n for n in (1, 5, 3)]
        work = {
            sum(
                s.num_keys - s.num_queries + i + 1
                for s in segments(lengths, cp_size=cp_size, cp_rank=rank)
                for i in range(s.num_queries)
            )
            for rank in range(cp_size)
        }
        assert len(work) == 1
