"""Who may ask, for what, for how long, and how often."""

import asyncio
import re
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatrain.errors import BusyError, ConfigError, DeniedError
from megatrain.service.auth import meter
from megatrain.service.auth.authenticate import LOCAL, Authenticator
from megatrain.service.auth.key import new_key
from megatrain.service.auth.principal import Principal
from megatrain.service.store import keys, usage
from megatrain.service.store.store import Store
from tests.unit.service.auth.conftest import config

DAY = time.strftime("%Y-%m-%d", time.gmtime())


def shown(key: str) -> Mapping[str, str]:
    return {"x-api-key": key}


async def with_key(url: str, *scopes: str, expires_in_s: float | None = None) -> tuple[Store, str]:
    store = await Store.open(url)
    key, record = new_key("alice", "laptop", scopes or ("train",), expires_in_s=expires_in_s)
    await store.write(keys.add(record))
    return store, key


def test_a_key_is_taken_in_both_headers_and_says_whose_it_is(url: str) -> None:
    async def check() -> None:
        store, key = await with_key(url, "train", "sample")
        auth = Authenticator(store, config())
        who = Principal("alice", 1, frozenset({"train", "sample"}), "laptop")
        assert await auth.authenticate({"x-api-key": key}, "train") == who
        assert await auth.authenticate({"authorization": f"Bearer {key}"}, "sample") == who
        assert await auth.authenticate({"authorization": f"bearer  {key} "}, "read") == who
        await store.close()

    asyncio.run(check())


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": ""},
        {"x-api-key": "dummy"},
        {"authorization": "Basic tml-0123456789"},
        {"authorization": "Bearer"},
        {"x-api-key": "tml-" + "0" * 43},
        {"x-api-key": "tml-\udcff"},
        {"x-api-key": "tml-" + "x" * 100000},
    ],
)
def test_a_missing_or_unknown_key_is_refused(url: str, headers: Mapping[str, str]) -> None:
    async def check() -> None:
        store, _ = await with_key(url)
        with pytest.raises(DeniedError):
            await Authenticator(store, config()).authenticate(headers, "read")
        await store.close()

    asyncio.run(check())


def test_a_key_is_for_its_scopes_alone_and_every_key_may_look(url: str) -> None:
    async def check() -> None:
        store, key = await with_key(url, "sample")
        auth = Authenticator(store, config())
        await auth.authenticate(shown(key), "sample")
        await auth.authenticate(shown(key), "read")
        for scope in ("train", "admin"):
            with pytest.raises(DeniedError, match=f"scope '{scope}'"):
                await auth.authenticate(shown(key), scope)
        await store.close()

    asyncio.run(check())


def test_a_key_that_is_revoked_by_another_process_is_refused_within_a_second(
    url: str, tmp_path: Path
) -> None:
    async def check() -> None:
        store, key = await with_key(url)
        auth = Authenticator(store, config())
        await auth.authenticate(shown(key), "train")
        other = sqlite3.connect(tmp_path / "service.db")
        other.execute("UPDATE keys SET revoked = ?", (time.time(),))
        other.commit()
        other.close()
        await asyncio.sleep(1.0)
        with pytest.raises(DeniedError, match="revoked"):
            await auth.authenticate(shown(key), "train")
        await store.close()

    asyncio.run(check())


def test_a_key_that_is_known_is_not_looked_up_for_every_request(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatrain.service.auth.authenticate.KNOWN_FOR_S", 1000.0)

    async def check() -> None:
        store, key = await with_key(url)
        auth = Authenticator(store, config())
        await auth.authenticate(shown(key), "train")
        await store.write(keys.revoke(1, time.time()))
        await auth.authenticate(shown(key), "train")
        await store.close()

    asyncio.run(check())


def test_a_key_that_has_expired_is_refused(url: str) -> None:
    async def check() -> None:
        store, key = await with_key(url, expires_in_s=-1.0)
        with pytest.raises(DeniedError, match="expired"):
            await Authenticator(store, config()).authenticate(shown(key), "read")
        await store.close()

    asyncio.run(check())


def test_the_use_of_a_key_is_noted(url: str) -> None:
    async def check() -> None:
        store, key = await with_key(url)
        before = time.time()
        await Authenticator(store, config()).authenticate(shown(key), "read")
        (record,) = await store.read(keys.all_keys())
        assert record.last_used is not None
        assert record.last_used >= before
        await store.close()

    asyncio.run(check())


def test_the_first_start_makes_a_key_for_everything_and_later_ones_none(url: str) -> None:
    async def check() -> None:
        store = await Store.open(url)
        auth = Authenticator(store, config())
        key = await auth.first_key()
        assert key is not None
        assert (await auth.authenticate(shown(key), "admin")).project == "default"
        assert await auth.first_key() is None
        await store.write(keys.revoke(1, time.time()))
        assert await auth.first_key() is None  # a revoked key brings no new one
        await store.close()

    asyncio.run(check())


def test_without_keys_everybody_is_the_same(url: str) -> None:
    async def check() -> None:
        store = await Store.open(url)
        auth = Authenticator(store, config(keys=False))
        assert await auth.first_key() is None
        assert await auth.authenticate({}, "admin") == LOCAL
        assert await auth.authenticate(shown("tml-anything"), "train") == LOCAL
        await store.close()

    asyncio.run(check())


def test_a_key_is_in_the_database_as_a_hash_alone(url: str, tmp_path: Path) -> None:
    async def check() -> str:
        store, key = await with_key(url)
        await Authenticator(store, config()).authenticate(shown(key), "read")
        await store.close()
        return key

    key = asyncio.run(check())
    assert re.fullmatch(r"tml-[A-Za-z0-9_-]{43}", key)
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert key.encode() not in kept
    assert key[12:].encode() not in kept


def test_two_keys_differ_and_unknown_scopes_are_refused() -> None:
    assert new_key("p", "n", ("train",))[0] != new_key("p", "n", ("train",))[0]
    with pytest.raises(ConfigError, match="'everything'"):
        new_key("p", "n", ("train", "everything"))


def test_a_key_that_asks_too_often_is_told_when_to_come_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("megatrain.service.auth.bucket.time.monotonic", lambda: clock[0])

    async def check() -> None:
        store, key = await with_key(url)
        _, second = new_key("bob", "", ("train",))
        await store.write(keys.add(second))
        auth = Authenticator(store, config(requests_per_s=2.0))
        for _ in range(20):  # a burst of ten seconds' worth
            await auth.authenticate(shown(key), "train")
        with pytest.raises(BusyError) as refused:
            await auth.authenticate(shown(key), "train")
        assert refused.value.retry_after_s == pytest.approx(0.5)
        clock[0] += 0.5
        await auth.authenticate(shown(key), "train")
        with pytest.raises(BusyError):
            await auth.authenticate(shown(key), "train")
        await store.close()

    asyncio.run(check())


def test_one_keys_requests_are_not_anothers(url: str) -> None:
    async def check() -> None:
        store, key = await with_key(url)
        other, record = new_key("bob", "", ("train",))
        await store.write(keys.add(record))
        auth = Authenticator(store, config(requests_per_s=0.001))
        await auth.authenticate(shown(key), "train")
        with pytest.raises(BusyError):
            await auth.authenticate(shown(key), "train")
        await auth.authenticate(shown(other), "train")
        await store.close()

    asyncio.run(check())


def test_a_projects_day_is_used_up_even_over_a_restart(url: str) -> None:
    alice, bob = (Principal(name, 1, frozenset({"train"})) for name in ("alice", "bob"))

    async def check() -> None:
        store = await Store.open(url)
        auth = Authenticator(store, config(tokens_per_day=100))
        await auth.spend(alice, 60)
        with pytest.raises(BusyError, match="60 of 100") as refused:
            await auth.spend(alice, 41)
        auth.settle(await auth.spend(alice, 40), 15)
        failed = await auth.spend(alice, 25)
        with pytest.raises(BusyError, match="100 of 100"):
            await auth.spend(alice, 1)
        auth.settle(failed, 0)
        assert 0 < refused.value.retry_after_s <= 86400
        await auth.spend(bob, 100)
        await auth.flush()
        again = Authenticator(store, config(tokens_per_day=100))
        await again.spend(alice, 25)
        with pytest.raises(BusyError, match="100 of 100"):
            await again.spend(alice, 1)
        await store.close()

    asyncio.run(check())


def test_what_is_used_is_counted_without_a_limit_too(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "FLUSH_S", 0.01)

    async def check() -> None:
        store = await Store.open(url)
        auth = Authenticator(store, config())
        who = Principal("alice", 1, frozenset({"train"}))
        await asyncio.gather(*(auth.spend(who, 5) for _ in range(8)))
        async with asyncio.timeout(20):
            while await store.read(usage.tokens_of("alice", DAY)) < 40:
                await asyncio.sleep(0.01)
        await auth.spend(who, 2)
        await auth.flush()
        assert await store.read(usage.tokens_of("alice", DAY)) == 42
        await store.close()

    asyncio.run(check())


def test_what_keys_do_is_written_down(url: str) -> None:
    async def check() -> None:
        store, key = await with_key(url)
        auth = Authenticator(store, config())
        who = await auth.authenticate(shown(key), "train")
        await auth.audit(who, "checkpoint_delete", "tinker://r/weights/a", "127.0.0.1")
        (entry,) = await store.read(usage.audit_page("alice", 10, 0))
        assert (entry.key_id, entry.action, entry.object) == (
            1,
            "checkpoint_delete",
            "tinker://r/weights/a",
        )
        assert await store.read(usage.audit_page("default", 10, 0)) == []
        await store.close()

    asyncio.run(check())
