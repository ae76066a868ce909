"""What is over goes, what is in use stays, and one failure keeps nothing else."""

import asyncio
from dataclasses import replace

from megatrain.service.store import checkpoints, points, requests, runs, samplers, sessions, usage
from megatrain.service.store.janitor import Keep, Swept, sweep
from megatrain.service.store.records import AuditEntry, Checkpoint, Point
from megatrain.service.store.store import Store
from tests.unit.service.store import rows

KEEP = Keep(result_s=10.0, session_s=100.0, audit_s=500.0, usage_s=1000.0)
NOW = 2_000_000.0


async def nothing(_: Checkpoint) -> None:
    """Delete nothing."""


def test_results_go_after_their_time_and_what_waits_stays(url: str) -> None:
    async def check() -> None:
        store = await Store.open(url)
        for name, finished in (("old", NOW - 11), ("new", NOW - 9)):
            await store.write(requests.add(rows.request(name)))
            await store.write(requests.finish(name, "done", b"x", "json", finished, 0))
        await store.write(requests.add(rows.request("waits")))
        assert (await sweep(store, KEEP, NOW, nothing)).results == 1
        left = [await store.read(requests.get("mine", n)) for n in ("old", "new", "waits")]
        assert [each is not None for each in left] == [False, True, True]
        assert await sweep(store, KEEP, NOW, nothing) == Swept()
        await store.close()

    asyncio.run(check())


def test_a_checkpoint_that_cannot_be_deleted_is_tried_again_and_keeps_no_other(url: str) -> None:
    async def check() -> None:
        store = await Store.open(url)
        for name in ("a", "bad", "c"):
            record = rows.checkpoint(f"tinker://r/weights/{name}", expires=NOW - 1)
            await store.write(checkpoints.put(record))
        broken = {"bad"}

        async def remove(record: Checkpoint) -> None:
            if record.name in broken:
                raise OSError("the disk says no")
            await store.write(checkpoints.delete(record.path))

        first = await sweep(store, KEEP, NOW, remove)
        assert (first.checkpoints, first.checkpoints_left) == (2, 1)
        broken.clear()
        assert (await sweep(store, KEEP, NOW, remove)).checkpoints == 1
        assert await store.read(checkpoints.list_page("mine")) == ([], 0)
        await store.close()

    asyncio.run(check())


def test_sessions_that_are_over_go_with_runs_and_curves_unless_a_checkpoint_is_left(
    url: str,
) -> None:
    async def check() -> None:
        store = await Store.open(url)
        old = NOW - 101
        ended = replace(rows.session("ended", created=old), status="finished")
        kept = replace(rows.session("kept", created=old), status="finished")
        await store.write(
            *(sessions.add(each) for each in (ended, kept, rows.session("alive", created=old)))
        )
        for session, state in (("ended", "released"), ("kept", "released"), ("alive", "live")):
            made = replace(rows.run(f"r-{session}", created=old, session_id=session), state=state)
            curve = [Point(made.id, 1, old, "loss", 1.0)]
            await store.write(
                runs.add(made),
                points.add(curve),
                samplers.add(rows.sampler(session, "mine", session)),
            )
        await store.write(checkpoints.put(rows.checkpoint("tinker://k", run_id="r-kept")))

        swept = await sweep(store, KEEP, NOW, nothing)

        assert (swept.sessions, swept.runs) == (1, 1)
        for name, is_left in (("ended", False), ("kept", True), ("alive", True)):
            assert (await store.read(sessions.get("mine", name)) is not None) is is_left
            assert (await store.read(runs.get("mine", f"r-{name}")) is not None) is is_left
            assert bool(await store.read(points.of_run(f"r-{name}"))) is is_left
        assert await store.read(samplers.ids_of("alive")) == ["alive"]
        assert await store.read(samplers.ids_of("ended")) == []
        await store.close()

    asyncio.run(check())


def test_a_young_session_that_is_over_stays(url: str) -> None:
    async def check() -> None:
        store = await Store.open(url)
        young = replace(rows.session("young", created=NOW - 99), status="errored")
        await store.write(sessions.add(young))
        assert (await sweep(store, KEEP, NOW, nothing)).sessions == 0
        await store.close()

    asyncio.run(check())


def test_old_logs_and_counts_go(url: str) -> None:
    async def check() -> None:
        store = await Store.open(url)
        for when in (NOW - 501, NOW - 499):
            entry = AuditEntry(time=when, project="mine", key_id=1, action="a", object="o")
            await store.write(usage.audit(entry))
        await store.write(usage.count("1970-01-01", "mine", 1, "tokens", 5))
        await store.write(usage.count("1970-01-24", "mine", 1, "tokens", 6))
        ages = (999, 1001)
        await store.write(*[usage.use(rows.used("mine", "s", int(NOW - age))) for age in ages])
        assert (await sweep(store, KEEP, NOW, nothing)).audit == 1
        assert await store.read(usage.by_hour("mine", 0, NOW, 10)) == [
            rows.used("mine", "s", int(NOW - 999))
        ]
        assert await store.read(usage.tokens_of("mine", "1970-01-01")) == 0
        assert await store.read(usage.tokens_of("mine", "1970-01-24")) == 6
        await store.close()

    asyncio.run(check())
