"""A driver takes over what the one before it had accepted: by tag, each done exactly once."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatrain.bus.commands import Command, Ping, Save
from megatrain.bus.driver import Driver
from megatrain.config.bus import BusConfig, RecoveryPolicy
from megatrain.errors import ConfigError, StateError
from tests.fixtures.bus_server import FakeRanks, change, changes, wait_until
from tests.unit.bus.test_driver_again import abandon, at


def tagged(number: Any) -> Command:
    """Return a change with a tag of its own."""
    return dataclasses.replace(change(number), tag=f"t{number}")


@pytest.fixture
def config(tmp_path: Path) -> BusConfig:
    return BusConfig(journal=tmp_path / "j", recovery=RecoveryPolicy(snapshot_every_commands=1000))


@pytest.fixture(params=["the same ranks", "new ranks"])
def again(ranks: FakeRanks, request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Return a function that returns where a second driver finds ranks."""
    first = ranks.start()
    calls: list[int] = []

    def address() -> Any:
        calls.append(1)
        return first if len(calls) == 1 or request.param == "the same ranks" else ranks.start()

    return address


def test_results_that_were_not_confirmed_come_again_by_their_tags(
    ranks: FakeRanks, again: Callable[[], Any], config: BusConfig
) -> None:
    old = at(ranks, again(), config)
    for number in range(4):
        assert old.submit(tagged(number), hold=True).result(10.0) == number + 1
    old.confirm("t0")
    old.confirm("t0")
    old.confirm("nobody's")
    abandon(old)
    with at(ranks, again(), config) as driver:
        assert {"t1", "t2", "t3"} <= driver.adopted.keys()
        assert driver.undone == {}
        found = {tag: each.result(10.0) for tag, each in driver.adopted.items()}
        assert found.items() <= {f"t{n}": n + 1 for n in range(4)}.items()
        assert driver.call(change(4)) == 5
        assert ranks.state == changes(range(5))


def test_a_failed_command_fails_again_in_the_same_way(
    ranks: FakeRanks, again: Callable[[], Any], config: BusConfig
) -> None:
    old = at(ranks, again(), config)
    old.submit(tagged(0), hold=True).result(10.0)
    first = old.submit(tagged("fails"), hold=True).exception(10.0)
    old.submit(tagged(1), hold=True).result(10.0)
    abandon(old)
    with at(ranks, again(), config) as driver:
        second = driver.adopted["tfails"].exception(10.0)
        assert isinstance(second, StateError)
        assert str(second) == str(first)
        assert driver.adopted["t1"].result(10.0) == 2
        assert driver.losses == []
        assert driver.call(change(2)) == 3


def test_what_was_confirmed_is_not_adopted_from_ranks_that_live_on(
    ranks: FakeRanks, config: BusConfig
) -> None:
    address = ranks.start()
    old = at(ranks, address, config)
    for number in range(3):
        old.submit(tagged(number), hold=True).result(10.0)
        old.confirm(f"t{number}")
    abandon(old)
    with at(ranks, address, config) as driver:
        assert driver.adopted == {}


def test_a_reply_that_is_gone_is_an_error_and_no_end_of_waiting(
    ranks: FakeRanks, config: BusConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The confirmation was lost with the host of the driver, and the ranks had heard of it."""
    address = ranks.start()
    old = at(ranks, address, config)
    old.submit(tagged(0), hold=True).result(10.0)
    with monkeypatch.context() as patched:
        patched.setattr(old.history, "_append", lambda *a, **k: None)
        old.confirm("t0")
    old.call(change(1))  # which acknowledges all before it
    abandon(old)
    with at(ranks, address, config) as driver:
        with pytest.raises(StateError, match="its result is gone"):
            driver.adopted["t0"].result(10.0)
        assert driver.call(change(2)) == 3


def test_a_save_that_is_whole_is_not_done_again_for_its_result(
    ranks: FakeRanks, config: BusConfig
) -> None:
    from megatrain.bus.commands import WaitForSave

    old = at(ranks, ranks.start(), config)
    save = Save(directory="d", background=True, tag="save")
    old.submit(save, hold=True).result(10.0)
    old.call(WaitForSave())
    abandon(old)
    saves = ranks.heard.count(save)
    with at(ranks, ranks.start(), config) as driver:
        with pytest.raises(StateError, match="not done again"):
            driver.adopted["save"].result(10.0)
        driver.confirm("save")
        driver.call(change(1))
        assert ranks.heard.count(save) == saves


def test_a_snapshot_counts_only_when_what_it_covers_is_confirmed(
    ranks: FakeRanks, tmp_path: Path
) -> None:
    recovery = RecoveryPolicy(snapshot_every_commands=3)
    config = BusConfig(journal=tmp_path / "j", recovery=recovery)
    old = at(ranks, ranks.start(), config)
    for number in range(3):
        old.submit(tagged(number), hold=True).result(10.0)
    wait_until(lambda: old.history._awaited is not None)
    for number in range(3, 8):  # another one would be due
        old.submit(tagged(number), hold=True).result(10.0)
    for number in (0, 2):
        old.confirm(f"t{number}")
    taken = old.history._awaited
    assert old.history.snapshot is None
    old.confirm("t1")
    wait_until(lambda: old.history.snapshot is not None)
    assert taken is not None
    assert old.history.snapshot == taken[:2]
    abandon(old)
    with at(ranks, ranks.start(), config) as driver:
        assert driver.adopted.keys() == {f"t{number}" for number in range(3, 8)}
        assert [driver.adopted[f"t{n}"].result(10.0) for n in range(3, 8)] == [4, 5, 6, 7, 8]
        assert ranks.state == changes(range(8))


def test_ranks_that_are_lost_while_they_are_told_again_still_give_every_result(
    ranks: FakeRanks, config: BusConfig
) -> None:
    old = Driver.launch(ranks, config)
    for number in range(6):
        old.submit(tagged(number), hold=True).result(10.0)
    abandon(old)
    lost: list[Command] = []

    def lose(command: Command, rank: Any) -> None:
        if command == change(3) and not lost:
            lost.append(command)
            ranks.lose()

    ranks.before = lose
    with Driver.launch(ranks, config) as driver:
        assert [driver.adopted[f"t{n}"].result(10.0) for n in range(6)] == [1, 2, 3, 4, 5, 6]
        assert len(driver.losses) == 1
        assert ranks.state == changes(range(6))


def test_closing_while_old_commands_are_told_again_drops_none_of_them(
    ranks: FakeRanks, config: BusConfig
) -> None:
    old = Driver.launch(ranks, config)
    for number in range(4):
        old.submit(tagged(number), hold=True).result(10.0)
    abandon(old)
    start = ranks.start

    def stuck() -> Any:
        address = start()
        ranks.gate.clear()
        return address

    ranks.start = stuck  # type: ignore[method-assign]
    Driver.launch(ranks, config).close()
    ranks.start = start  # type: ignore[method-assign]
    with Driver.launch(ranks, config) as driver:
        assert [driver.adopted[f"t{n}"].result(10.0) for n in range(4)] == [1, 2, 3, 4]


def test_a_tag_must_be_ones_own_while_it_is_held(ranks: FakeRanks, config: BusConfig) -> None:
    with Driver.launch(ranks, config) as driver:
        with pytest.raises(ConfigError, match="must have a tag"):
            driver.submit(change(0), hold=True)
        driver.submit(tagged(0), hold=True).result(10.0)
        with pytest.raises(ConfigError, match="held already"):
            driver.submit(tagged(0), hold=True)
        driver.confirm("t0")
        assert driver.submit(tagged(0), hold=True).result(10.0) == 2
        driver.submit(Ping(tag="ping"), hold=True).result(10.0)
        assert list(driver.history.held) == [2]  # what changes nothing is never held


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lives_on", [True, False])
def test_drivers_that_die_anywhere_do_each_command_once(
    ranks: FakeRanks, tmp_path: Path, seed: int, lives_on: bool
) -> None:
    """Results are kept as a service keeps them: stored first, confirmed later."""
    chance, total = random.Random(seed), 24
    recovery = RecoveryPolicy(snapshot_every_commands=3)
    config = BusConfig(journal=tmp_path / "j", recovery=recovery)
    stored: dict[str, Any] = {}
    address = ranks.start()
    while len(stored) < total:
        driver = at(ranks, address, config)
        futures = dict(driver.adopted)
        for number in range(total):
            if (tag := f"t{number}") not in stored and tag not in futures:
                futures[tag] = driver.submit(tagged(number), hold=True)
        for tag in futures.keys() & stored.keys():
            assert futures[tag].result(10.0) == stored[tag]
            driver.confirm(tag)
        new = sorted(futures.keys() - stored.keys(), key=lambda tag: int(tag[1:]))
        for tag in new[:6]:
            result = futures[tag].result(10.0)
            if chance.random() < 0.1:
                break
            assert stored.setdefault(tag, result) == result
            if chance.random() < 0.1:
                break
            driver.confirm(tag)
        abandon(driver)
        if not lives_on:
            address = ranks.start()
    assert stored == {f"t{number}": number + 1 for number in range(total)}
    with at(ranks, address, config) as driver:
        driver.call(change(total))
        assert ranks.state == changes(range(total + 1))
