"""Writes are committed together, refused alone, and none that was acknowledged is lost."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, event, func, select
from sqlalchemy.exc import IntegrityError

from megatrain.errors import ConfigError, DataError, StateError
from megatrain.service.store import requests, sessions, tables, usage
from megatrain.service.store.store import Store
from tests.unit.service.store.conftest import Postgres
from tests.unit.service.store.rows import request, session

CHILD = """
import asyncio, sys
from megatrain.service.store import requests
from megatrain.service.store.store import Store
from tests.unit.service.store.rows import request

async def main():
    store = await Store.open(sys.argv[1])
    async def write(task):
        for number in range(100000):
            name = f"{task}-{number}"
            await store.write(requests.add(request(name)))
            print(name, flush=True)
    await asyncio.gather(*(write(task) for task in range(8)))

asyncio.run(main())
"""


def count(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(tables.requests)).scalar_one()


def ids(connection: Connection) -> set[str]:
    return set(connection.execute(select(tables.requests.c.id)).scalars())


def test_what_was_written_is_read_back_as_it_was(url: str) -> None:
    async def check() -> None:
        store = await Store.open(url)
        await store.write(requests.add(request("one")), sessions.add(session("s")))
        assert await store.read(requests.get("mine", "one")) == request("one")
        assert await store.read(sessions.get("mine", "s")) == session("s")
        await store.close()
        again = await Store.open(url)
        assert await again.read(requests.get("mine", "one")) == request("one")
        await again.close()

    asyncio.run(check())


def test_a_write_that_is_refused_fails_alone(url: str) -> None:
    async def check() -> None:
        store = await Store.open(url)
        await store.write(requests.add(request("taken")))
        names = ["a", "taken", "b", "taken", "c"]
        found = await asyncio.gather(
            *(store.write(requests.add(request(name))) for name in names), return_exceptions=True
        )
        assert [isinstance(each, IntegrityError) for each in found] == [False, True] * 2 + [False]
        assert await store.read(ids) == {"a", "b", "c", "taken"}
        await store.close()

    asyncio.run(check())


def test_changes_of_one_write_are_all_done_or_none(url: str) -> None:
    async def check() -> None:
        store = await Store.open(url)
        await store.write(requests.add(request("taken")))
        with pytest.raises(IntegrityError):
            await store.write(requests.add(request("new")), requests.add(request("taken")))
        assert await store.read(ids) == {"taken"}
        await store.close()

    asyncio.run(check())


def test_sixty_four_writers_share_commits(url: str) -> None:
    async def check() -> None:
        store = await Store.open(url)
        commits = 0

        def counted(_: object) -> None:
            nonlocal commits
            commits += 1

        event.listen(store._engine, "commit", counted)

        async def write(task: int) -> None:
            for number in range(10):
                await store.write(requests.add(request(f"{task}-{number}")))

        await asyncio.gather(*(write(task) for task in range(64)))
        assert await store.read(count) == 640
        assert 10 <= commits < 320
        await store.close()

    asyncio.run(check())


def test_a_cancelled_writer_does_not_stop_the_others(sqlite_url: str) -> None:
    async def check() -> None:
        store = await Store.open(sqlite_url)
        cancelled = [asyncio.ensure_future(store.write(requests.add(request("x"))))]
        await asyncio.sleep(0)
        cancelled[0].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await cancelled[0]
        async with asyncio.timeout(20):
            await store.write(requests.add(request("y")))
        assert await store.read(ids) == {"x", "y"}
        await store.close()

    asyncio.run(check())


def test_an_error_in_a_change_reaches_its_caller_and_no_other(sqlite_url: str) -> None:
    def broken(_: Connection) -> None:
        raise ZeroDivisionError("of the change")

    async def check() -> None:
        store = await Store.open(sqlite_url)
        found = await asyncio.gather(
            store.write(broken), store.write(requests.add(request("a"))), return_exceptions=True
        )
        assert isinstance(found[0], ZeroDivisionError)
        assert found[1] is None
        await store.close()

    asyncio.run(check())


def test_what_waits_is_committed_before_the_store_closes(sqlite_url: str) -> None:
    async def check() -> None:
        store = await Store.open(sqlite_url)
        waiting = [
            asyncio.ensure_future(store.write(requests.add(request(str(number)))))
            for number in range(500)
        ]
        await asyncio.sleep(0)
        await store.close()
        await asyncio.gather(*waiting)
        with pytest.raises(StateError, match="closed"):
            await store.write(requests.add(request("late")))
        again = await Store.open(sqlite_url)
        assert await again.read(count) == 500
        await again.close()

    asyncio.run(check())


def test_a_value_that_no_column_holds_is_the_users_error(url: str) -> None:
    def too_large(connection: Connection) -> None:
        requests.add(request("n", seq=1 << 70))(connection)

    async def check() -> None:
        store = await Store.open(url)
        with pytest.raises(DataError, match="cannot hold"):
            await store.write(too_large)
        await store.close()

    asyncio.run(check())


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(
    sqlite_url: str, tmp_path: Path
) -> None:
    with (tmp_path / "said").open("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, sqlite_url],
            stdout=said,
            cwd=Path(__file__).parents[4],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
        )
        try:
            while (tmp_path / "said").stat().st_size < 2000 and child.poll() is None:
                time.sleep(0.02)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        said.seek(0)
        acknowledged = {line.strip() for line in said if line.endswith("\n")}
    assert len(acknowledged) > 100

    async def check() -> None:
        store = await Store.open(sqlite_url)
        assert acknowledged <= await store.read(ids)
        await store.close()

    asyncio.run(check())


def test_several_processes_may_open_a_new_database_at_once(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda _: asyncio.run(Store.open(url)), range(6)))
    for store in stores:
        asyncio.run(store.close())


@pytest.mark.parametrize(
    "bad", ["", "nonsense", "mysql://secret@host/x", "sqlite://", "sqlite:///:memory:"]
)
def test_a_url_of_no_database_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError) as refused:
        asyncio.run(Store.open(bad))
    assert "secret" not in str(refused.value)


def test_a_database_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be opened"):
        asyncio.run(Store.open(f"sqlite:///{tmp_path}/no/such/folder/x.db"))


def test_the_file_is_its_owners_alone(sqlite_url: str, tmp_path: Path) -> None:
    async def check() -> None:
        store = await Store.open(sqlite_url)
        await store.write(requests.add(request("one")))
        modes = {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
        assert modes == {0o600}
        await store.close()

    asyncio.run(check())


def after_commit(store: Store, then: Callable[[], None]) -> None:
    """Call once, after the next commit has reached the database, before the store knows of it."""
    dialect, real = store._engine.dialect, store._engine.dialect.do_commit
    left = [1]

    def commit(connection: Any) -> None:
        real(connection)
        if left:
            left.pop()
            then()
            connection.driver_connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    dialect.do_commit = commit  # type: ignore[method-assign, assignment]


def test_a_commit_whose_answer_was_lost_is_not_done_again(empty_postgres: str) -> None:
    async def check() -> None:
        store = await Store.open(empty_postgres)
        heard: list[bool] = []
        after_commit(store, lambda: heard.append(True))
        found = await asyncio.gather(
            store.write(requests.add(request("one"))),
            store.write(usage.count("day", "mine", 1, "tokens", 5)),
            return_exceptions=True,
        )
        assert heard
        assert found == [None, None]
        assert await store.read(count) == 1
        assert await store.read(usage.tokens_of("mine", "day")) == 5
        await store.close()

    asyncio.run(check())


def test_writes_and_reads_wait_for_a_postgresql_that_was_killed(
    postgres: Postgres, empty_postgres: str
) -> None:
    async def check() -> None:
        store = await Store.open(empty_postgres)
        acknowledged: set[str] = set()

        async def write(task: int) -> None:
            for number in range(60):
                await store.write(
                    requests.add(request(f"{task}-{number}")),
                    usage.count("day", "mine", 1, "tokens", 1),
                )
                acknowledged.add(f"{task}-{number}")

        async def kill() -> None:
            for _ in range(2):
                before = len(acknowledged)
                while len(acknowledged) < before + 40:
                    await asyncio.sleep(0.005)
                await asyncio.to_thread(postgres.kill)
                reading = asyncio.ensure_future(store.read(ids))
                kept = set(acknowledged)
                await asyncio.to_thread(postgres.start)
                assert kept <= await reading

        await asyncio.gather(kill(), *(write(task) for task in range(8)))
        assert await store.read(ids) == acknowledged
        assert await store.read(usage.tokens_of("mine", "day")) == len(acknowledged) == 480
        await store.close()

    asyncio.run(check())


def test_a_postgresql_that_stays_away_is_an_error_after_a_while(
    postgres: Postgres, empty_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        store = await Store.open(empty_postgres)
        monkeypatch.setattr("megatrain.service.store.store.LOST_S", 0.6)
        await asyncio.to_thread(postgres.kill)
        try:
            with pytest.raises(StateError, match="could not be written"):
                await store.write(requests.add(request("one")))
            with pytest.raises(StateError, match="could not be read"):
                await store.read(ids)
        finally:
            await asyncio.to_thread(postgres.start)
        await store.write(requests.add(request("two")))
        assert await store.read(ids) == {"two"}
        await store.close()

    asyncio.run(check())
