"""The pool of ranks: results by rank, failures with every traceback, layouts one after another."""

import os

import pytest

from megatrain.parallel.layout import DeviceMesh
from megatrain.testing.ranks import RankFailure, RankPool
from megatrain.testing.tiny import FAMILIES
from tests.unit.testing import pool_tasks

pytestmark = pytest.mark.multiprocess


def test_a_task_runs_on_every_rank_of_a_mesh_and_processes_live_on(ranks):
    first = ranks.run(pool_tasks.who, DeviceMesh(tp=2, pp=2), "x")
    second = ranks.run(pool_tasks.who, DeviceMesh(cp=2), "y")
    assert [(rank, world, word) for _, rank, world, word in first] == [
        (0, 4, "x"),
        (1, 4, "x"),
        (2, 4, "x"),
        (3, 4, "x"),
    ]
    assert [(rank, world, word) for _, rank, world, word in second] == [(0, 2, "y"), (1, 2, "y")]
    pids = [pid for pid, *_ in first]
    assert [pid for pid, *_ in second] == pids[:2]
    assert len({*pids, os.getpid()}) == 5


def test_a_failure_holds_the_traceback_of_each_rank_that_raised(ranks):
    with pytest.raises(RankFailure) as caught:
        ranks.run(pool_tasks.fail_on_odd_ranks, DeviceMesh(dp=4))
    text = str(caught.value)
    assert "rank 1" in text
    assert "rank 3" in text
    assert "rank 0:" not in text
    assert "ValueError: odd" in text


@pytest.fixture
def own_pool():
    pool = RankPool(2)
    yield pool
    pool.close()


def test_a_rank_that_does_not_answer_in_time_is_a_failure(own_pool):
    with pytest.raises(RankFailure, match=r"no answer within 1\.0 s"):
        own_pool.run(pool_tasks.sleep_on_rank_1, DeviceMesh(dp=2), timeout_s=1.0)


def test_a_rank_that_dies_is_named(own_pool):
    with pytest.raises(RankFailure, match="rank 1 died"):
        own_pool.run(pool_tasks.die_on_rank_1, DeviceMesh(dp=2), timeout_s=20.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_checkpoint_is_the_same_each_time_and_has_nothing_that_is_zero(
    family, tmp_path, checkpoints
):
    from safetensors.torch import load_file

    from megatrain.testing.tiny import make_checkpoint

    one, two = checkpoints(family), make_checkpoint(tmp_path / "again", family)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.equal(second[name])
        assert value.float().abs().sum() > 0, name
