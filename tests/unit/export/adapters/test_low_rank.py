"""Factors against torch's own decompositions of the whole product."""

import pytest
import torch

from megatrain.export.adapters import low_rank
from megatrain.export.adapters.low_rank import compress, decompose, grow, pad, product_norm


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 40)])
@pytest.mark.parametrize("rank", [1, 4, 24])
def test_a_decomposition_is_the_best_one_and_says_its_error(shape, rank):
    matrix = normal(*shape)
    found = decompose(matrix, rank)
    assert (found.a.shape, found.b.shape) == ((rank, shape[1]), (shape[0], rank))
    tail = torch.linalg.svdvals(matrix)[rank:]
    assert found.error == pytest.approx(float(tail.norm()), abs=1e-4)
    assert found.error == pytest.approx(float((matrix - found.b @ found.a).norm()), abs=1e-4)
    assert found.norm == pytest.approx(float(matrix.norm()), rel=1e-6)


def test_the_randomised_decomposition_is_near_the_best_and_leaves_the_generator_alone(monkeypatch):
    matrix = normal(300, 8) @ normal(8, 200, seed=1) + 0.01 * normal(300, 200, seed=2)
    best = decompose(matrix, 8)
    monkeypatch.setattr(low_rank, "EXACT_SIDE", 100)
    before = torch.random.get_rng_state()
    found = decompose(matrix, 8)
    assert torch.equal(before, torch.random.get_rng_state())
    assert best.error <= found.error * (1 + 1e-6)
    assert found.error <= 1.01 * best.error


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_compressing_factors_is_decomposing_their_product(rank):
    a, b = normal(8, 50), normal(30, 8, seed=1)
    found = compress(a, b, rank)
    best = decompose(b @ a, rank)
    torch.testing.assert_close(found.b @ found.a, best.b @ best.a, rtol=0, atol=2e-4)
    assert found.error == pytest.approx(best.error, abs=1e-4)
    assert found.relative_error == pytest.approx(best.error / best.norm, abs=1e-5)


def test_growing_and_padding_change_no_product_and_growing_can_be_trained():
    a, b = normal(3, 20), normal(10, 3, seed=1)
    for new_a, new_b in (pad(a, b, 8), (lambda f: (f.a, f.b))(grow(a, b, 8, seed=1))):
        assert (new_a.shape, new_b.shape) == ((8, 20), (10, 8))
        torch.testing.assert_close(new_b @ new_a, b @ a, rtol=0, atol=1e-6)
    grown = grow(a, b, 8, seed=1)
    assert grown.a[3:].abs().min() > 0
    assert grown.a[3:].abs().max() <= 20**-0.5
    assert torch.equal(grown.a, grow(a, b, 8, seed=1).a)


def test_the_norm_of_a_product_is_known_without_it():
    a, b = normal(4, 50), normal(30, 4, seed=1)
    assert product_norm(a, b) == pytest.approx(float((b @ a).norm()), rel=1e-6)
