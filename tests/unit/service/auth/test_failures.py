"""Unknown keys are slowed down by address, in bounded memory; known ones never are."""

import asyncio

import pytest

from megatrain.errors import BusyError, DeniedError
from megatrain.service.auth import failures
from megatrain.service.auth.authenticate import Authenticator
from megatrain.service.auth.failures import BURST, Failures
from megatrain.service.auth.key import new_key
from megatrain.service.store import keys
from megatrain.service.store.store import Store
from tests.unit.service.auth.conftest import config


async def refusal(auth: Authenticator, key: str) -> Exception:
    with pytest.raises((DeniedError, BusyError)) as refused:
        await auth.authenticate({"x-api-key": key}, "train", "10.0.0.1")
    return refused.value


def test_an_address_that_shows_unknown_keys_is_told_to_wait_and_others_are_not(url: str) -> None:
    async def check() -> None:
        store = await Store.open(url)
        key, record = new_key("alice", "laptop", ("train",))
        await store.write(keys.add(record))
        auth = Authenticator(store, config())
        await auth.authenticate({"x-api-key": key}, "train", "10.0.0.1")
        refused = [await refusal(auth, f"tml-{number}") for number in range(2 * int(BURST))]
        assert type(refused[int(BURST) - 1]) is DeniedError
        assert type(refused[-1]) is BusyError
        await auth.authenticate({"x-api-key": key}, "train", "10.0.0.1")
        with pytest.raises(DeniedError):
            await auth.authenticate({"x-api-key": "tml-unknown"}, "train", "10.0.0.2")
        await store.close()

    asyncio.run(check())


def test_a_host_has_one_bucket_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "BURST", 2.0)
    found = Failures()
    found.note("2001:db8::1")
    found.note("2001:db8::2")
    with pytest.raises(BusyError):
        found.check("2001:db8::ffff:3")
    found.check("2001:db8:0:1::1")


def test_only_so_many_addresses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "BURST", 1.0)
    monkeypatch.setattr(failures, "MAX_ADDRESSES", 3)
    found = Failures()
    for number in range(4):
        found.note(f"10.0.0.{number}")
    found.check("10.0.0.0")
    with pytest.raises(BusyError):
        found.check("10.0.0.3")
