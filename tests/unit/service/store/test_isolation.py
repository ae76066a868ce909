"""Whatever takes a project gives nothing of another."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection

from megatrain.service.store import checkpoints, points, requests, runs, samplers, sessions, usage
from megatrain.service.store.records import AuditEntry, Point
from megatrain.service.store.store import Store
from tests.unit.service.store import rows

Query = Callable[[Connection], Any]

PATH = "tinker://r-theirs/weights/one"

QUERIES: dict[str, Callable[[str], Query]] = {
    "requests.get": lambda project: requests.get(project, "q-theirs"),
    "requests.by_idem": lambda project: requests.by_idem(project, "idem:q-theirs"),
    "sessions.get": lambda project: sessions.get(project, "s-theirs"),
    "sessions.list_page": lambda project: sessions.list_page(project, 10, 0),
    "sessions.search": lambda project: sessions.search(project, session_id="s-theirs"),
    "checkpoints.sizes": lambda project: checkpoints.sizes(project),
    "runs.get": lambda project: runs.get(project, "r-theirs"),
    "runs.list_page": lambda project: runs.list_page(project, 10, 0),
    "checkpoints.get": lambda project: checkpoints.get(project, PATH),
    "checkpoints.readable": lambda project: checkpoints.readable(project, PATH),
    "checkpoints.list_page": lambda project: checkpoints.list_page(project, run="r-theirs"),
    "points.last_losses": lambda project: points.last_losses(project, ["r-theirs"]),
    "usage.tokens_of": lambda project: usage.tokens_of(project, "day"),
    "usage.by_hour": lambda project: usage.by_hour(project, 0, 7200, 10),
    "usage.sessions_by_hour": lambda project: usage.sessions_by_hour(project, 0, 7200),
    "usage.audit_page": lambda project: usage.audit_page(project, 10, 0),
}
"""Every query of a project; below is checked that none is left out."""


async def filled(url: str) -> Store:
    store = await Store.open(url)
    entry = AuditEntry(time=1.0, project="theirs", key_id=2, action="a", object="o")
    await store.write(
        requests.add(rows.request("q-theirs", "theirs", run="r-theirs")),
        sessions.add(rows.session("s-theirs", "theirs")),
        runs.add(rows.run("r-theirs", "theirs", session_id="s-theirs")),
        checkpoints.put(rows.checkpoint(PATH, "theirs", run_id="r-theirs")),
        points.add([Point("r-theirs", 0, 1.0, "loss", 2.5)]),
        samplers.add(rows.sampler("m-theirs", "theirs", "s-theirs")),
        usage.count("day", "theirs", 2, "tokens", 7),
        usage.use(rows.used("theirs", "s-theirs")),
        usage.audit(entry),
    )
    return store


def test_no_query_gives_anything_of_another_project(url: str) -> None:
    async def check() -> None:
        store = await filled(url)
        for name, query in QUERIES.items():
            empty = await store.read(query("nobody"))
            assert await store.read(query("mine")) == empty, name
            assert await store.read(query("theirs")) != empty, name
        await store.close()

    asyncio.run(check())


def test_every_query_that_takes_a_project_is_tried() -> None:
    found = set()
    for module in (checkpoints, points, requests, runs, samplers, sessions, usage):
        short = module.__name__.rsplit(".", 1)[-1]
        for name, function in inspect.getmembers(module, inspect.isfunction):
            is_own = function.__module__ == module.__name__ and not name.startswith("_")
            takes = next(iter(inspect.signature(function).parameters), "") == "project"
            if is_own and takes:
                found.add(f"{short}.{name}")
    assert found == set(QUERIES)


def test_a_public_checkpoint_is_read_by_others_and_listed_by_its_owner_alone(url: str) -> None:
    async def check() -> None:
        store = await filled(url)
        await store.write(checkpoints.set_fields(PATH, public=True))
        assert await store.read(checkpoints.readable("mine", PATH)) is not None
        assert await store.read(checkpoints.get("mine", PATH)) is None
        assert await store.read(checkpoints.list_page("mine")) == ([], 0)
        await store.close()

    asyncio.run(check())
