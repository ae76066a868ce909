"""A driver finds its ranks, goes on after another one, and ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from megatrain.bus.address import Address
from megatrain.bus.codec import encode
from megatrain.bus.commands import Command, OpenModel, Ping, RestoreSnapshot
from megatrain.bus.driver import Driver
from megatrain.bus.frames import Kind
from megatrain.bus.ranks import RanksAt
from megatrain.config.bus import BusConfig, RecoveryPolicy
from megatrain.errors import BusError, ConfigError, RankError, StateError
from megatrain.parallel.layout import DeviceMesh
from tests.fixtures.bus_server import FakeRank, FakeRanks, change, changes, driven, wait_until


def test_ranks_of_another_layout_are_refused(ranks: FakeRanks) -> None:
    with pytest.raises(ConfigError, match="laid out as"):
        Driver.launch(ranks, BusConfig(), mesh=DeviceMesh(tp=2))
    assert ranks.rank is None


def test_ranks_that_end_while_they_start_are_said_so(tmp_path: Path) -> None:
    class Dying(FakeRanks):
        def start(self) -> Address:
            self._failure = "rank 1 (pid 5) ended with exit status 1"
            return Address(path=str(tmp_path / "nobody"))

    with pytest.raises(RankError, match=r"ended while they started: rank 1(.|\n)*last words"):
        Driver.launch(Dying(tmp_path), BusConfig())


def test_nobody_at_an_address_is_said_so_in_time(tmp_path: Path) -> None:
    config = BusConfig(connect_timeout_s=0.3)
    with pytest.raises(BusError, match=r"no ranks listen at unix:.* after 0.3 s"):
        Driver.connect(f"unix:{tmp_path}/nobody", config)


def at(ranks: FakeRanks, address: Address, config: BusConfig) -> Driver:
    """Return a driver of ranks that somebody else has started."""
    return Driver(RanksAt(address), config, mesh=None, can_snapshot=True)


def abandon(driver: Driver) -> None:
    """Leave as a driver that was killed: nothing is said, and nothing written."""
    driver._broken = BusError("killed")  # its threads end
    driver.supervisor.join()
    driver.link.close()
    driver.history._journal.close()


def test_a_driver_leaves_ranks_that_others_started_as_it_found_them(
    ranks: FakeRanks, tmp_path: Path
) -> None:
    address = ranks.start()
    for number in range(2):
        with at(ranks, address, BusConfig()) as driver:
            assert driver.call(change(number)) == 1
    assert ranks.heard[-1] == RestoreSnapshot(directory=None)
    with at(ranks, address, BusConfig(journal=tmp_path / "j")) as driver:
        driver.call(change(1))
    assert ranks.starts == 1
    assert ranks.state == changes([1])  # one with a journal may come back


def test_a_model_that_could_not_be_opened_once_is_opened_later(
    ranks: FakeRanks, tmp_path: Path
) -> None:
    """Its checkpoint was away for a moment, and the driver after it finds it."""
    folder, config = tmp_path / "model", BusConfig(journal=tmp_path / "j")
    old = at(ranks, ranks.start(), config)
    with pytest.raises(StateError, match="no checkpoint"):
        old.call(OpenModel(model_id=str(folder), options={}))
    assert old.call(change(1)) == 1
    abandon(old)
    folder.mkdir()
    with at(ranks, ranks.start(), config) as driver:
        assert driver.call(OpenModel(model_id=str(folder), options={})) == 2
        assert driver.losses == []


def test_a_new_driver_with_the_journal_goes_on(ranks: FakeRanks, tmp_path: Path) -> None:
    address, config = ranks.start(), BusConfig(journal=tmp_path / "j")
    old = at(ranks, address, config)
    for number in range(3):
        old.call(change(number))
    ranks.gate.clear()
    old.submit(change(3))
    old.submit(change(4))
    abandon(old)
    ranks.gate.set()
    with at(ranks, address, config) as driver:
        assert sorted(driver.undone) == [4, 5]
        assert [driver.undone[seq].result(10.0) for seq in (4, 5)] == [4, 5]
        assert driver.call(change(5)) == 6
        assert ranks.state == changes(range(6))
        assert ranks.starts == 1


def test_a_new_driver_does_not_take_an_old_reply_for_its_own(
    ranks: FakeRanks, tmp_path: Path
) -> None:
    """Commands that change nothing have numbers too, and are in no journal."""
    address, config = ranks.start(), BusConfig(journal=tmp_path / "j")
    old = at(ranks, address, config)
    old.call(change(0))
    for _ in range(3):
        old.ping()
    abandon(old)
    with at(ranks, address, config) as driver:
        for number in range(1, 6):
            assert driver.submit(change(number)).result(5.0) == number + 1
        assert ranks.state == changes(range(6))


def test_a_new_driver_tells_new_ranks_all_that_the_old_ones_knew(
    ranks: FakeRanks, tmp_path: Path
) -> None:
    recovery = RecoveryPolicy(snapshot_every_commands=3)
    config = BusConfig(journal=tmp_path / "j", recovery=recovery)
    old = at(ranks, ranks.start(), config)
    for number in range(8):
        old.call(change(number))
    abandon(old)
    with at(ranks, ranks.start(), config) as driver:
        assert driver.call(change(8)) == 9
        assert ranks.state == changes(range(9))


def test_ranks_that_heard_half_of_it_hear_the_rest(
    ranks: FakeRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver dies while it tells new ranks what the old ones knew."""
    config = BusConfig(journal=tmp_path / "j")
    old = at(ranks, ranks.start(), config)
    for number in range(6):
        old.call(change(number))
    abandon(old)
    address = ranks.start()
    from megatrain.bus.link import Link

    sent: list[Kind] = []
    send = Link.send

    def dies(self: Link, kind: Kind, body: bytes) -> None:
        sent.append(kind)
        if len(sent) > 3:
            raise RuntimeError("killed")
        send(self, kind, body)

    with monkeypatch.context() as patched:
        patched.setattr(Link, "send", dies)
        with pytest.raises(RuntimeError, match="killed"):
            at(ranks, address, config)
    wait_until(lambda: ranks.rank and ranks.rank.server._driver is None)
    with at(ranks, address, config) as driver:
        assert driver.call(change(6)) == 7
        assert ranks.state == changes(range(7))


def test_an_old_drivers_half_written_snapshot_is_not_taken_for_a_new_one(
    ranks: FakeRanks, tmp_path: Path
) -> None:
    recovery = RecoveryPolicy(snapshot_every_commands=2)
    config = BusConfig(journal=tmp_path / "j", recovery=recovery)
    stale = tmp_path / "j" / "snapshot-3"
    stale.mkdir(parents=True)
    (stale / "rank-00000.json").write_text('["stale"]')
    with at(ranks, ranks.start(), config) as driver:
        driver.call(change(1))
        driver.call(change(2))
        wait_until(lambda: driver.history.snapshot is not None)
        abandon(driver)
    with at(ranks, ranks.start(), config) as driver:
        assert driver.call(change(3)) == 3
        assert ranks.state == changes([1, 2, 3])


def test_a_journal_in_use_is_refused_and_its_ranks_are_ended(
    ranks: FakeRanks, tmp_path: Path
) -> None:
    config = BusConfig(journal=tmp_path / "j")
    with at(ranks, ranks.start(), config):
        other = FakeRanks(tmp_path)
        with pytest.raises(BusError, match="another driver uses the journal"):
            Driver.launch(other, config)
        assert other.rank is None


def test_a_result_that_is_too_large_is_an_error(
    ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(self: FakeRank, command: Command, job: Any) -> Any:
        return bytes(1 << 20)

    config = BusConfig(max_message_bytes=1 << 18)
    ranks.config = config
    monkeypatch.setattr(FakeRank, "_result", result)
    with driven(ranks, config) as driver, pytest.raises(BusError, match="max_message_bytes"):
        driver.submit(Ping()).result(5.0)


def test_a_reply_that_makes_no_sense_is_no_end_without_a_word(ranks: FakeRanks) -> None:
    config = BusConfig(recovery=RecoveryPolicy(max_restarts=2))
    with driven(ranks, config) as driver:
        driver.call(Ping())
        for body in (encode("no number, no reply"), b"short"):
            count = len(driver.losses)
            assert ranks.rank is not None
            ranks.rank.server.tell(Kind.REPLY, body)
            wait_until(lambda count=count: len(driver.losses) > count, 5.0)
            assert driver.call(Ping()) is None


SCRIPT = """
import os, sys, time
from pathlib import Path
from megatrain.bus.commands import Ping
from megatrain.bus.driver import Driver
from megatrain.config.bus import BusConfig
from tests.fixtures.bus_server import FakeRanks, change

ranks = FakeRanks(Path(sys.argv[1]))
driver = Driver.launch(ranks, BusConfig(journal=Path(sys.argv[1]) / "journal"))
driver.call(change(1))
child = os.fork()
if not child:
    time.sleep(60)  # stands for a rank: it is to be ended
    os._exit(0)
close = ranks.close
ranks.close = lambda **how: (close(**how), os.kill(child, 9), os.waitpid(child, 0))
print(child, flush=True)
ranks.before = lambda command, rank: time.sleep(0.5)
for number in range(100):
    driver.submit(change(number))
driver.call(Ping())
"""


def test_ctrl_c_ends_a_script_in_time_with_its_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd()
    ) as script:
        assert script.stdout is not None
        child = int(script.stdout.readline())
        time.sleep(0.3)
        script.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, errors = script.communicate(timeout=30)
        assert time.monotonic() - start < 20.0
    assert script.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
