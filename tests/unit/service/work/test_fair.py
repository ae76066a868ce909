"""Tokens are shared by weight, whatever the sizes of requests."""

import collections

import pytest

from megatrain.service.work.fair import Fair


def served(costs: dict[str, float], weights: dict[str, float], rounds: int) -> dict[str, float]:
    """Return the tokens of each flow, all of which have work all the time."""
    fair: Fair[str] = Fair()
    tokens: collections.Counter[str] = collections.Counter()
    for _ in range(rounds):
        name = fair.choose(costs, weights)
        assert name is not None
        tokens[name] += costs[name]
    return dict(tokens)


def test_small_and_large_requests_get_the_same_tokens() -> None:
    tokens = served({"small": 10.0, "large": 5000.0}, {"small": 1.0, "large": 1.0}, 20000)
    assert tokens["small"] == pytest.approx(tokens["large"], rel=0.05)


def test_a_weight_of_three_gets_three_times_as_much() -> None:
    tokens = served({"a": 700.0, "b": 300.0}, {"a": 3.0, "b": 1.0}, 5000)
    assert tokens["a"] / tokens["b"] == pytest.approx(3.0, rel=0.05)


def test_equal_flows_take_turns() -> None:
    fair: Fair[str] = Fair()
    costs = dict.fromkeys("abc", 100.0)
    order = [fair.choose(costs, dict.fromkeys("abc", 1.0)) for _ in range(300)]
    counts = collections.Counter(order[:60])
    assert max(counts.values()) - min(counts.values()) <= 11  # of one quantum


def test_a_flow_without_work_saves_nothing() -> None:
    fair: Fair[str] = Fair()
    both, weights = {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}
    fair.choose(both, weights)
    for _ in range(5000):
        assert fair.choose({"a": 1.0}, weights) == "a"
    later = collections.Counter(fair.choose(both, weights) for _ in range(4096))
    assert later["b"] <= 3100


def test_nobody_with_work_is_nobody_chosen() -> None:
    assert Fair[str]().choose({}, {}) is None


def test_a_request_that_is_far_larger_than_a_quantum_is_chosen_in_one_call() -> None:
    assert Fair[str]().choose({"a": 1e9}, {"a": 1e-3}) == "a"
