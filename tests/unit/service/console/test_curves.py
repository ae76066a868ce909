"""Curves in the store, and what clients may add to them."""

import asyncio
import math

import pytest

from megatrain.errors import DataError
from megatrain.service.console.curves import OVERLAP_S, columns
from megatrain.service.store import points
from megatrain.service.store.records import Point
from megatrain.service.store.store import Store


def point(step: int, name: str = "reward", value: float = 0.0, time: float = 1.0) -> Point:
    return Point("run", step, time, name, value)


def with_store(tmp_path, check) -> None:
    async def run() -> None:
        store = await Store.open(f"sqlite:///{tmp_path / 'service.db'}")
        await check(store)
        await store.close()

    asyncio.run(run())


def test_what_is_no_number_is_a_gap_and_the_next_answer_overlaps() -> None:
    curve = [point(1, value=0.5, time=100.0), point(2, value=math.inf, time=120.0)]
    shown = columns({"reward": curve})
    assert shown["curves"] == {"reward": {"steps": [1, 2], "values": [0.5, None]}}
    assert shown["until"] == 120.0 - OVERLAP_S
    assert columns({}) == {"curves": {}, "until": 0.0}


def test_too_many_points_or_curves_are_refused_whole(tmp_path) -> None:
    async def check(store: Store) -> None:
        limits = {"own": {"loss"}, "max_names": 2, "max_points": 5}
        await store.write(points.add([point(step, "loss") for step in range(20)]))
        await store.write(points.add_within([point(1), point(1, "kl")], **limits))
        with pytest.raises(DataError, match="it would have 3, of 3"):
            await store.write(points.add_within([point(1, "third")], **limits))
        with pytest.raises(DataError, match="it would have 2, of 6"):
            await store.write(points.add_within([point(s) for s in range(2, 6)], **limits))
        await store.write(points.add_within([point(1, value=0.75)], **limits))
        found = await store.read(points.of_run("run"))
        assert sorted(found) == ["kl", "loss", "reward"]
        assert [(each.step, each.value) for each in found["reward"]] == [(1, 0.75)]

    with_store(tmp_path, check)


def test_only_what_was_added_since_is_read_and_the_last_point_always(tmp_path) -> None:
    async def check(store: Store) -> None:
        await store.write(points.add([point(step, time=float(step)) for step in range(100)]))
        since = await store.read(points.of_run("run", since=97.0))
        assert [each.step for each in since["reward"]] == [97, 98, 99]
        thinned = await store.read(points.of_run("run", most=10))
        steps = [each.step for each in thinned["reward"]]
        assert (steps[0], steps[-1]) == (0, 99)
        assert len(steps) == 11

    with_store(tmp_path, check)
