"""What each table's functions write and find."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from megatrain.service.store import checkpoints, keys, points, requests, runs, samplers, sessions
from megatrain.service.store import usage as used
from megatrain.service.store.records import ApiKey, AuditEntry, Point, Project
from megatrain.service.store.store import Store
from tests.unit.service.store import rows

With = Callable[[Callable[[Store], Awaitable[None]]], None]


@pytest.fixture
def with_store(url: str) -> With:
    """Run something on an empty store."""

    async def run(check: Callable[[Store], Awaitable[None]]) -> None:
        store = await Store.open(url)
        try:
            await check(store)
        finally:
            await store.close()

    return lambda check: asyncio.run(run(check))


def test_the_first_result_of_a_request_counts_and_its_body_goes(with_store: With) -> None:
    async def check(store: Store) -> None:
        await store.write(requests.add(rows.request("q")))
        await store.write(requests.finish("q", "done", b"first", "proto", 5.0, 7))
        await store.write(requests.finish("q", "failed", b"second", "json", 6.0, 8))
        found = await store.read(requests.get("mine", "q"))
        assert found is not None
        assert (found.state, found.result, found.result_type) == ("done", b"first", "proto")
        assert (found.payload, found.finished, found.tokens) == (b"", 5.0, 7)

    with_store(check)


def test_what_waits_comes_back_in_the_order_of_runs_and_numbers(with_store: With) -> None:
    async def check(store: Store) -> None:
        for run, seq in (("b", 1), ("a", 10), ("a", 2), ("a", 9), ("b", 0)):
            await store.write(requests.add(rows.request(f"{run}{seq}", run=run, seq=seq)))
        await store.write(requests.finish("a9", "done", b"", "json", 5.0, 0))
        waiting = await store.read(requests.open_requests())
        assert [each.id for each in waiting] == ["a2", "a10", "b0", "b1"]
        assert await store.read(requests.finished_seqs("a", 0)) == [9]
        assert await store.read(requests.finished_seqs("a", 10)) == []

    with_store(check)


def test_old_results_are_forgotten_and_what_waits_is_kept(with_store: With) -> None:
    async def check(store: Store) -> None:
        for name, finished in (("old", 5.0), ("new", 50.0)):
            await store.write(requests.add(rows.request(name)))
            await store.write(requests.finish(name, "done", b"x", "json", finished, 0))
        await store.write(requests.add(rows.request("waits")))
        await store.write(requests.expire(10.0))
        left = [await store.read(requests.get("mine", n)) for n in ("old", "new", "waits")]
        assert [each is not None for each in left] == [False, True, True]

    with_store(check)


def test_a_session_ends_once(with_store: With) -> None:
    async def check(store: Store) -> None:
        await store.write(sessions.add(rows.session("s")), sessions.touch("s", 9.0))
        assert [each.last_seen for each in await store.read(sessions.active())] == [9.0]
        await store.write(sessions.finish("s", "errored", "why", 10.0))
        await store.write(sessions.finish("s", "expired", None, 20.0))
        found = await store.read(sessions.get("mine", "s"))
        assert found is not None
        assert (found.status, found.detail, found.last_seen) == ("errored", "why", 10.0)
        assert await store.read(sessions.active()) == []

    with_store(check)


def test_a_search_goes_through_all_sessions_page_by_page_even_of_one_moment(
    with_store: With,
) -> None:
    async def check(store: Store) -> None:
        made = [rows.session(f"s{number}", created=float(number // 4)) for number in range(11)]
        await store.write(*(sessions.add(each) for each in made))
        seen: list[str] = []
        before: tuple[float, str] | None = None
        while page := await store.read(sessions.search("mine", before=before, limit=3)):
            seen += [each.id for each in page]
            before = page[-1].created, page[-1].id
        newest_first = sorted(made, key=lambda each: (-each.created, each.id))
        assert seen == [each.id for each in newest_first]

    with_store(check)


def test_a_search_takes_names_and_states(with_store: With) -> None:
    async def check(store: Store) -> None:
        await store.write(
            sessions.add(rows.session("a", display_name="first")),
            sessions.add(rows.session("b", display_name="second", status="errored")),
        )
        by_name = await store.read(sessions.search("mine", display_name="second"))
        by_state = await store.read(sessions.search("mine", statuses=["active", "finished"]))
        assert [each.id for each in by_name] == ["b"]
        assert [each.id for each in by_state] == ["a"]

    with_store(check)


def test_a_runs_progress_never_goes_back(with_store: With) -> None:
    async def check(store: Store) -> None:
        await store.write(runs.add(rows.run("r")))
        await store.write(runs.progress("r", 5, 2, 10.0))
        await store.write(runs.progress("r", 3, 2, 11.0))
        found = await store.read(runs.get("mine", "r"))
        assert found is not None
        assert (found.next_seq, found.step, found.last_request) == (5, 2, 11.0)

    with_store(check)


def test_runs_on_the_ranks_are_those_that_are_made_or_live(with_store: With) -> None:
    async def check(store: Store) -> None:
        for number, state in enumerate(("creating", "live", "released", "failed")):
            await store.write(runs.add(rows.run(state, created=float(number))))
            await store.write(runs.set_state(state, state))
        assert [each.id for each in await store.read(runs.live())] == ["creating", "live"]
        page, total = await store.read(runs.list_page("mine", 2, 1))
        assert ([each.id for each in page], total) == (["released", "live"], 4)
        assert await store.read(runs.ids_of("s")) == ["creating", "live", "released", "failed"]

    with_store(check)


def test_a_checkpoint_of_the_same_path_takes_the_place_of_the_one_before(with_store: With) -> None:
    async def check(store: Store) -> None:
        first = rows.checkpoint("tinker://r/weights/a")
        await store.write(checkpoints.put(first))
        await store.write(checkpoints.put(replace(first, step=9, size_bytes=99)))
        found, total = await store.read(checkpoints.list_page("mine", run="r"))
        assert ([each.step for each in found], total) == ([9], 1)
        await store.write(checkpoints.delete(first.path))
        assert await store.read(checkpoints.get("mine", first.path)) is None

    with_store(check)


def test_checkpoints_whose_time_is_over_are_found_and_the_others_not(with_store: With) -> None:
    async def check(store: Store) -> None:
        for name, expires in (("never", None), ("over", 5.0), ("later", 50.0)):
            path = f"tinker://r/weights/{name}"
            await store.write(checkpoints.put(rows.checkpoint(path, expires=expires)))
        assert [each.name for each in await store.read(checkpoints.expired(10.0))] == ["over"]

    with_store(check)


def test_the_newest_checkpoint_of_each_kind_is_a_runs_last(with_store: With) -> None:
    async def check(store: Store) -> None:
        for number, kind in enumerate(("training", "sampler", "training")):
            path = f"tinker://r/{kind}/{number}"
            made = rows.checkpoint(path, kind=kind, created=float(number))
            await store.write(checkpoints.put(made))
        last = await store.read(checkpoints.last_of("r"))
        assert {kind: each.name for kind, each in last.items()} == {
            "training": "2",
            "sampler": "1",
        }

    with_store(check)


def test_samplers_of_sessions_that_are_over_are_not_taken_up(with_store: With) -> None:
    async def check(store: Store) -> None:
        await store.write(
            sessions.add(rows.session("s")),
            sessions.add(rows.session("over", status="finished")),
            samplers.add(rows.sampler("m")),
            samplers.add(rows.sampler("n", session_id="over")),
        )
        assert [each.id for each in await store.read(samplers.active("base"))] == ["m"]
        assert await store.read(samplers.active("another")) == []
        assert await store.read(samplers.ids_of("over")) == ["n"]

    with_store(check)


def test_a_key_is_found_by_its_hash_and_revoked_once(with_store: With) -> None:
    async def check(store: Store) -> None:
        key = ApiKey(
            project="mine",
            name="n",
            hash="h" * 64,
            prefix="tml-abcd",
            scopes=("train", "sample"),
            created=1.0,
        )
        project = Project(id="mine", name="mine", created=1.0)
        await store.write(keys.add_project(project), keys.add_project(project), keys.add(key))
        found = await store.read(keys.by_hash("h" * 64))
        assert found == replace(key, id=1)
        assert await store.read(keys.by_hash("g" * 64)) is None
        await store.write(keys.used(1, 3.0), keys.revoke(1, 5.0), keys.revoke(1, 6.0))
        assert await store.read(keys.all_keys()) == [replace(key, id=1, last_used=3.0, revoked=5.0)]

    with_store(check)


def test_usage_adds_up_by_day_and_project(with_store: With) -> None:
    async def check(store: Store) -> None:
        await store.write(
            used.count("d1", "mine", 1, "train", 5),
            used.count("d1", "mine", 1, "train", 6),
            used.count("d1", "mine", 2, "sample", 7),
            used.count("d2", "mine", 1, "train", 100),
        )
        assert await store.read(used.tokens_of("mine", "d1")) == 18
        assert await store.read(used.tokens_of("mine", "d3")) == 0

    with_store(check)


def test_the_audit_log_is_read_newest_first(with_store: With) -> None:
    async def check(store: Store) -> None:
        entries = [
            AuditEntry(time=float(n), project="mine", key_id=1, action="delete", object=str(n))
            for n in range(4)
        ]
        await store.write(*(used.audit(each) for each in entries))
        assert await store.read(used.audit_page("mine", 2, 1)) == [entries[2], entries[1]]

    with_store(check)


def test_a_step_done_again_replaces_its_points_and_long_curves_are_thinned(
    with_store: With,
) -> None:
    async def check(store: Store) -> None:
        curve = [Point("r", step, float(step), "loss", float(step)) for step in range(101)]
        await store.write(points.add(curve), points.add([Point("r", 100, 7.0, "loss", -1.0)]))
        found = (await store.read(points.of_run("r", most=10)))["loss"]
        assert len(found) <= 11
        assert found[0] == curve[0]
        assert found[-1] == Point("r", 100, 7.0, "loss", -1.0)
        whole = (await store.read(points.of_run("r")))["loss"]
        assert [each.step for each in whole] == list(range(101))
        assert await store.read(points.of_run("another")) == {}

    with_store(check)
