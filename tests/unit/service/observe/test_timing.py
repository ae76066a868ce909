"""Phases of a request add up to its time, and those that did not happen are left out."""

import pytest

from megatrain.service.observe.timing import Spent, Timing


def timing(**times: float) -> Timing:
    spent = Spent(bus_s=0.5, ranks_s=0.4)
    return Timing(accepted=10.0, committed=10.1, spent=spent, **times)


def test_phases_add_up():
    found = timing(began=10.3, replied=11.0, ended=11.2).phases()
    expected = {
        "commit": 0.1, "queue": 0.2, "submit": 0.2, "bus": 0.1, "ranks": 0.4, "result": 0.2
    }  # fmt: skip
    assert found == pytest.approx(expected)
    assert list(found) == list(expected)
    assert sum(found.values()) == pytest.approx(1.2)


def test_a_request_that_is_not_over_has_no_phases():
    assert timing(began=10.3).phases() == {}


def test_what_never_left_the_queue_has_its_commit_alone():
    assert list(timing(ended=11.0).phases()) == ["commit"]


def test_what_is_not_done_by_the_ranks_is_work():
    assert timing(began=10.3, ended=11.0).phases()["work"] == pytest.approx(0.7)
