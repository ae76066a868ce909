"""What happens when ranks are lost: they start again and know what they knew, or it is given up."""

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatrain.bus.commands import Command, Ping, TakeSnapshot
from megatrain.bus.driver import Driver
from megatrain.bus.events import Event
from megatrain.bus.trouble import Trouble
from megatrain.config.bus import BusConfig, RecoveryPolicy
from megatrain.errors import DeadlineError, RankError, StateError
from tests.fixtures.bus_server import FakeRank, FakeRanks, change, changes, driven, wait_until


def config(folder: Path | None = None, *, heartbeat: float = 4.0, **policy: Any) -> BusConfig:
    recovery = RecoveryPolicy(**({"restart_timeout_s": 10.0} | policy))
    return BusConfig(journal=folder, heartbeat_timeout_s=heartbeat, recovery=recovery)


def lose_over(ranks: FakeRanks, poison: Command, texts: list[str]) -> None:
    """Lose the ranks whenever they begin with a command, each time with the next text."""

    def before(command: Command, rank: FakeRank) -> None:
        if command == poison and texts:
            ranks.lose(texts.pop(0))

    ranks.before = before


def test_ranks_start_again_and_know_what_they_knew(ranks: FakeRanks) -> None:
    with driven(ranks) as driver:
        for number in range(5):
            assert driver.call(change(number)) == number + 1
        ranks.lose("rank 1 (pid 7) was killed by SIGKILL")
        assert driver.call(change(5)) == 6
        assert ranks.state == changes(range(6))
        assert ranks.starts == 2
        assert driver.losses == ["rank 1 (pid 7) was killed by SIGKILL"]


def test_a_loss_in_the_middle_is_not_seen_by_the_caller(ranks: FakeRanks) -> None:
    lose_over(ranks, change(3), ["rank 0 (pid 1) was killed by SIGSEGV"])
    with driven(ranks) as driver:
        futures = [driver.submit(change(number)) for number in range(8)]
        assert [each.result(10.0) for each in futures] == list(range(1, 9))
        assert ranks.state == changes(range(8))


def test_a_command_over_which_ranks_are_lost_twice_alike_is_given_up_alone(
    ranks: FakeRanks,
) -> None:
    texts = [f"rank 1 (pid {pid}) was killed by SIGSEGV" for pid in (5, 6)]
    lose_over(ranks, change("poison"), texts)
    with driven(ranks) as driver:
        before, bad, after = (driver.submit(change(each)) for each in ("a", "poison", "b"))
        assert before.result(10.0) == 1
        with pytest.raises(RankError, match=r"ZeroGrad \(command 2\) was given up.*2 times") as e:
            bad.result(10.0)
        assert e.value.command == "ZeroGrad"
        assert "last words of a rank" in str(e.value)
        assert after.result(10.0) == 2
        assert ranks.state == changes("ab")
        assert len(driver.losses) == 2
        ranks.lose()
        assert driver.call(change("c")) == 3
        assert ranks.state == changes("abc")


def test_losses_that_are_not_alike_do_not_give_up_the_command(ranks: FakeRanks) -> None:
    lose_over(ranks, change("x"), ["rank 1 was killed by SIGKILL", "rank 0 was killed by SIGKILL"])
    with driven(ranks) as driver:
        assert driver.call(change("x")) == 1
        assert ranks.starts == 3


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("rank 1 (host a, pid 12) has given no sign of life for 4.1 s (bound 4 s), in Step "
         "(command 7), phase forward",
         "rank 1 (host b, pid 99) has given no sign of life for 4.4 s (bound 4 s), in Step "
         "(command 9), phase forward", True),
        ("rank 1 (pid 12) was killed by SIGKILL", "rank 1 (pid 3) was killed by SIGKILL", True),
        ("rank 1 (pid 12) was killed by SIGKILL", "rank 1 (pid 12) was killed by SIGSEGV", False),
        ("rank 1 (pid 12) was killed by SIGKILL", "rank 2 (pid 12) was killed by SIGKILL", False),
        ("rank 1 is gone, phase forward", "rank 1 is gone, phase backward", False),
    ],
)  # fmt: skip
def test_losses_are_alike_but_for_what_always_differs(one: str, other: str, alike: bool) -> None:
    assert (Trouble(one).signature == Trouble(other).signature) is alike


def test_more_attempts_may_be_allowed(ranks: FakeRanks) -> None:
    lose_over(ranks, change("x"), ["the same"] * 3)
    with driven(ranks, config(max_attempts=4, max_restarts=9)) as driver:
        assert driver.call(change("x")) == 1
        assert ranks.starts == 4


def test_after_too_many_restarts_the_driver_gives_up_and_says_why(ranks: FakeRanks) -> None:
    texts = [f"rank {number} is gone" for number in range(9)]
    lose_over(ranks, change("x"), texts)
    with driven(ranks, config(max_restarts=2)) as driver:
        futures = [driver.submit(change(each)) for each in ("a", "x", "b")]
        assert futures[0].result(10.0) == 1
        for each in futures[1:]:
            with pytest.raises(RankError, match=r"rank 2 is gone \(after 2 restarts"):
                each.result(10.0)
        with pytest.raises(RankError, match="lost for good: rank 2 is gone") as error:
            driver.submit(change("c"))
        assert "initialize(journal=...)" in str(error.value)
        assert driver.is_over
        assert driver.num_pending == 0
        limit = time.monotonic() + 10.0  # who waits hears of it first, then the ranks are let go
        while ranks.rank is not None and time.monotonic() < limit:
            time.sleep(0.01)
        assert ranks.rank is None


def test_no_restart_may_be_allowed(ranks: FakeRanks) -> None:
    with driven(ranks, config(max_restarts=0)) as driver:
        ranks.lose("rank 0 is gone")
        with pytest.raises(RankError, match="rank 0 is gone"):
            driver.call(change(1))
        assert ranks.starts == 1


def test_restarts_long_ago_do_not_count(ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    with driven(ranks, config(max_restarts=1, reset_after_s=0.3)) as driver:
        for number in range(3):
            ranks.lose(f"loss {number}")
            assert driver.call(change(number)) == number + 1
            assert driver.supervisor.num_restarts == 1
            time.sleep(0.4)
        assert ranks.starts == 4


def test_a_late_command_is_a_deadline_error_after_two_times(ranks: FakeRanks) -> None:
    from megatrain.bus.codec import encode
    from megatrain.bus.frames import Kind

    def before(command: Command, rank: FakeRank) -> None:
        if command == change("slow"):
            body = {"text": "rank 1 is alive but was not done within 3 s", "late": True}
            rank.server.tell(Kind.LOST, encode(body | {"ranks": [1], "stacks": "the stack"}))
            rank._over.wait(5.0)

    ranks.before = before
    with driven(ranks) as driver:
        slow, after = driver.submit(change("slow"), deadline_s=3.0), driver.submit(change("b"))
        with pytest.raises(DeadlineError, match=r"not done within 3 s, 2 times(.|\n)*the stack"):
            slow.result(10.0)
        assert after.result(10.0) == 1


def test_silence_of_rank_0_is_a_loss(ranks: FakeRanks) -> None:
    with driven(ranks, config(heartbeat=0.5)) as driver:
        driver.call(change(1))
        ranks.gate.clear()
        ranks.is_silent = True
        assert driver.call(change(2)) == 2
        assert "rank 0 (host host, pid 1) has given no sign of life" in driver.losses[0]


def test_a_driver_that_stood_still_itself_does_not_lose_its_ranks(ranks: FakeRanks) -> None:
    """As after Ctrl-Z, or while one call held Python's lock."""
    with driven(ranks, config(heartbeat=1.5)) as driver:
        driver.call(change(1))
        with driver.state:  # no thread of the driver goes on
            _hold_the_lock(2.5)
        assert driver.call(change(2)) == 2
        time.sleep(0.1)
        assert driver.losses == []


def _hold_the_lock(seconds: float) -> None:
    """Keep all other threads of this process from running."""
    import ctypes

    ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL keeps the lock


def test_a_connection_that_breaks_alone_is_made_again(ranks: FakeRanks) -> None:
    with driven(ranks) as driver:
        driver.call(change(1))
        driver.link.close()
        assert driver.call(change(2)) == 2
        assert ranks.state == changes([1, 2])


def test_snapshots_are_taken_when_due_and_ranks_start_from_them(ranks: FakeRanks) -> None:
    events: list[Event] = []
    with driven(ranks, config(snapshot_every_commands=3)) as driver:
        driver.observers.add(events.append)
        for number in range(10):
            driver.call(change(number))
            wait_until(lambda: not driver.history.is_due() and driver.history._awaited is None)
        wait_until(lambda: sum(each.kind == "snapshot" for each in events) >= 3)
        ranks.heard.clear()
        ranks.lose()
        assert driver.call(change(10)) == 11
        assert ranks.state == changes(range(11))
        names = [type(each).__name__ for each in ranks.heard]
        assert names[0] == "RestoreSnapshot"
        assert names.count("ZeroGrad") <= 4


def test_a_loss_while_a_snapshot_is_taken_loses_nothing(ranks: FakeRanks) -> None:
    lost = []

    def before(command: Command, rank: FakeRank) -> None:
        if isinstance(command, TakeSnapshot) and len(lost) < 2:
            lost.append(command)
            ranks.lose(f"loss {len(lost)}")

    ranks.before = before
    with driven(ranks, config(snapshot_every_commands=2)) as driver:
        for number in range(6):
            assert driver.call(change(number)) == number + 1
        wait_until(lambda: len(lost) == 2 and driver.history.snapshot is not None)
        assert driver.call(change(6)) == 7
        assert ranks.state == changes(range(7))


def test_a_snapshot_that_ranks_cannot_take_harms_nobody(ranks: FakeRanks) -> None:
    asked = []

    def before(command: Command, rank: FakeRank) -> None:
        if isinstance(command, TakeSnapshot):
            asked.append(command)
            Path(command.directory).parent.joinpath("x").mkdir(exist_ok=True)
            raise_on_next(command)

    def raise_on_next(command: TakeSnapshot) -> None:
        Path(command.directory).touch()  # a file is there: no folder can be made

    ranks.before = before
    real = FakeRank._result

    def result(self: FakeRank, command: Command, job: Any) -> Any:
        if isinstance(command, TakeSnapshot):
            raise ValueError("no room")
        return real(self, command, job)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FakeRank, "_result", result)
        with driven(ranks, config(snapshot_every_commands=1)) as driver:
            for number in range(3):
                assert driver.call(change(number)) == number + 1
            wait_until(lambda: asked)
            time.sleep(0.5)
            assert len(asked) <= 2  # and not as often as the supervisor looks
            ranks.lose()
            assert driver.call(change(3)) == 4


def test_a_command_that_failed_fails_again_when_it_is_done_again(ranks: FakeRanks) -> None:
    with driven(ranks) as driver:
        driver.call(change(1))
        with pytest.raises(StateError, match="it fails"):
            driver.call(change("fails"))
        ranks.lose()
        assert driver.call(change(2)) == 2
        assert not driver.is_over


def call_both(driver: Driver, one: Any, other: Any) -> None:
    """Do two changes: what is wrong with ranks may be heard of after the first."""
    driver.submit(change(one)).result(10.0)
    driver.submit(change(other)).result(10.0)


def test_ranks_that_cannot_be_what_they_were_are_not_used(ranks: FakeRanks) -> None:
    """A command that worked fails when it is done again: a file is gone, say."""
    with driven(ranks) as driver:
        driver.call(change("a"))
        driver.call(change("b"))

        def before(command: Command, rank: FakeRank) -> None:
            if command == change("a"):
                object.__setattr__(command, "adapter", "fails")

        ranks.before = before
        ranks.lose()
        with pytest.raises(RankError, match=r"could not be brought to where they were.*command 1"):
            call_both(driver, "c", "d")


def test_a_snapshot_that_is_gone_is_not_passed_over(ranks: FakeRanks) -> None:
    with driven(ranks, config(snapshot_every_commands=2)) as driver:
        driver.call(change(1))
        driver.call(change(2))
        wait_until(lambda: driver.history.snapshot is not None)
        assert driver.history.snapshot is not None
        (Path(driver.history.snapshot[1]) / "rank-00000.json").unlink()
        ranks.lose()
        with pytest.raises(RankError, match="could not be brought to where they were"):
            call_both(driver, 3, 4)


def test_observers_hear_of_losses_and_recoveries_and_cannot_harm(ranks: FakeRanks) -> None:
    events: list[Event] = []

    def broken(event: Event) -> None:
        raise ValueError("an observer's own mistake")

    with driven(ranks) as driver:
        driver.observers.add(broken)
        driver.observers.add(events.append)
        driver.call(change(1))
        ranks.lose("rank 0 is gone")
        driver.call(Ping())
        wait_until(lambda: any(each.kind == "recovered" for each in events))
        kinds = [each.kind for each in events]
        assert kinds.index("lost") < kinds.index("recovered")
        assert next(each for each in events if each.kind == "lost").text == "rank 0 is gone"


def test_ranks_that_do_not_start_again_are_given_up(ranks: FakeRanks) -> None:
    with driven(ranks, config(restart_timeout_s=0.3)) as driver:
        driver.call(change(1))

        def start() -> Any:
            raise RankError("no rank could be forked")

        ranks.start = start  # type: ignore[method-assign]
        ranks.lose("rank 0 is gone")
        with pytest.raises(RankError, match="could be forked"):
            driver.submit(change(2)).result(10.0)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_lost_and_when_nothing_is_lost_or_done_twice(
    ranks: FakeRanks, tmp_path: Path, seed: int
) -> None:
    order = random.Random(seed)
    count = order.randint(20, 60)
    moments = sorted(order.sample(range(2 * count), 4))
    lock, done = threading.Lock(), [0]

    def at(command: Command, rank: FakeRank) -> None:
        with lock:
            done[0] += 1
            if moments and done[0] >= moments[0]:
                moments.pop(0)
                ranks.lose(f"loss at {done[0]}")

    ranks.before, ranks.after = at, at
    policy = {"max_restarts": 99, "snapshot_every_commands": order.choice([3, 7, 1000])}
    journal = tmp_path / "journal" if order.random() < 0.5 else None
    with driven(ranks, config(journal, **policy)) as driver:
        futures = []
        for number in range(count):
            if order.random() < 0.3:
                driver.submit(Ping())
            futures.append(driver.submit(change(number)))
            if order.random() < 0.1:
                futures[-1].result(10.0)
        assert [each.result(20.0) for each in futures] == list(range(1, count + 1))
        assert driver.call(change("last")) == count + 1
        assert ranks.state == changes([*range(count), "last"])
