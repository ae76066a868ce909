"""A driver's commands: one order, each once, futures that always end, and a way to go on."""

import threading
import time
from concurrent.futures import Future, wait
from typing import Any

import pytest

from megatrain.bus.address import Address
from megatrain.bus.commands import Ping, Stop
from megatrain.bus.driver import Driver
from megatrain.bus.frames import Kind
from megatrain.config.bus import BusConfig, RecoveryPolicy
from megatrain.errors import BusError, CancelledCommandError, ConfigError, RankError, StateError
from tests.fixtures.bus_server import FakeRanks, change, changes, driven, wait_until


def test_results_come_in_the_order_of_acceptance(ranks: FakeRanks) -> None:
    with driven(ranks) as driver:
        order: list[int] = []
        futures = [driver.submit(change(number)) for number in range(50)]
        for number, each in enumerate(futures):
            each.add_done_callback(lambda _, number=number: order.append(number))
        assert [each.result(10.0) for each in futures] == list(range(1, 51))
        driver.outstanding.drain()  # callbacks run on a thread of their own
        assert sorted(order) == list(range(50))
        assert driver.num_pending == 0
        assert driver.ping() < 5.0


def test_an_error_of_the_ranks_is_raised_where_the_result_is_asked_for(ranks: FakeRanks) -> None:
    with driven(ranks) as driver:
        future = driver.submit(change("fails"))
        with pytest.raises(StateError, match="it fails"):
            future.result(10.0)
        assert driver.call(change(1)) == 1


def test_what_makes_a_result_of_a_value_may_fail_alone(ranks: FakeRanks) -> None:
    def finish(value: Any, trained: list[str]) -> Any:
        raise KeyError("mine")

    with driven(ranks) as driver:
        with pytest.raises(KeyError, match="mine"):
            driver.submit(Ping(), finish=finish).result(10.0)
        assert driver.submit(Ping(), finish=lambda value, trained: "made").result(10.0) == "made"


def test_what_cannot_travel_is_refused_and_takes_no_number(ranks: FakeRanks) -> None:
    with driven(ranks, BusConfig(max_message_bytes=1 << 16)) as driver:
        with pytest.raises(ConfigError, match="cannot be sent"):
            driver.submit(change(1).__class__(adapter=object()))  # type: ignore[arg-type]
        with pytest.raises(BusError, match="at most 65536 bytes"):
            driver.submit(change("x" * (1 << 16)))
        assert driver.last_seq == 0
        assert driver.call(change(1)) == 1


@pytest.mark.parametrize("deadline_s", [float("inf"), float("nan"), -1.0, 1e300])
def test_a_timeout_that_is_none_is_refused_and_harms_nobody(
    ranks: FakeRanks, deadline_s: float
) -> None:
    with driven(ranks) as driver:
        for command in (change(1), Ping()):
            with pytest.raises(ConfigError, match="timeout"):
                driver.submit(command, deadline_s=deadline_s)
        assert driver.call(change(1)) == 1


def test_no_more_than_max_queued_wait_and_each_threads_order_is_kept(ranks: FakeRanks) -> None:
    most, threads, each = 5, 6, 30
    with driven(ranks, BusConfig(max_queued=most)) as driver:
        seen: list[int] = []
        ranks.before = lambda command, rank: seen.append(driver.num_pending)
        futures: dict[int, list[Future[Any]]] = {number: [] for number in range(threads)}

        def submit(number: int) -> None:
            for index in range(each):
                futures[number].append(driver.submit(change(f"{number}-{index}")))

        workers = [threading.Thread(target=submit, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30.0)
        results = {number: [one.result(10.0) for one in own] for number, own in futures.items()}
        assert max(seen) <= most
        assert all(own == sorted(own) for own in results.values())
        state = list(ranks.state)
        for number in range(threads):
            own = [name for name in state if name.startswith(f"ZeroGrad {number}-")]
            assert own == changes(f"{number}-{index}" for index in range(each))
        assert len(state) == threads * each


def test_who_waits_for_room_is_let_go_when_the_driver_closes(ranks: FakeRanks) -> None:
    errors: list[BaseException] = []
    with driven(ranks, BusConfig(max_queued=1)) as driver:
        ranks.gate.clear()
        first = driver.submit(change(1))

        def submit() -> None:
            try:
                driver.submit(change(2)).result(10.0)
            except BusError as error:
                errors.append(error)

        thread = threading.Thread(target=submit)
        thread.start()
        time.sleep(0.1)
        assert thread.is_alive()
        threading.Timer(0.2, ranks.gate.set).start()
    thread.join(5.0)
    assert "closed" in str(errors[0])
    assert isinstance(first.exception(), CancelledCommandError)


def test_cancelled_in_time_is_never_done(ranks: FakeRanks) -> None:
    with driven(ranks) as driver:
        ranks.gate.clear()
        futures = [driver.submit(change(number)) for number in range(4)]
        wait_until(lambda: ranks.rank and ranks.rank.server.queued() == 3)
        assert futures[2].cancel()
        assert futures[2].cancelled()
        assert futures[2].cancel()  # again: it is
        ranks.gate.set()
        wait([each for each in futures if not each.cancelled()], 10.0)
        assert driver.call(change(4)) == 4
        ranks.lose()
        assert driver.call(change(5)) == 5
        assert ranks.state == changes([0, 1, 3, 4, 5])


def test_cancelled_too_late_is_done(ranks: FakeRanks) -> None:
    with driven(ranks) as driver:
        ranks.gate.clear()
        future = driver.submit(change(1))
        wait_until(lambda: ranks.rank and ranks.rank.server._started == 1)
        assert not future.cancel()
        ranks.gate.set()
        assert future.result(10.0) == 1
        assert not future.cancel()
        assert not future.cancelled()


def test_a_cancellation_whose_answer_was_lost_holds_after_a_loss(ranks: FakeRanks) -> None:
    """The connection breaks after rank 0 has taken the cancellation, and before it says so."""
    with driven(ranks) as driver:
        assert ranks.rank is not None
        driver.call(change("a"))
        ranks.gate.clear()
        driver.submit(change("b"))
        future = driver.submit(change("c"))
        wait_until(lambda: ranks.rank and ranks.rank.server.queued() == 1)
        from megatrain.bus.jobs import SEQ
        from megatrain.bus.server import CANCELLED_REPLY

        ranks.rank.server._cancelled.add(3)
        assert ranks.rank.server._driver is not None
        ranks.rank.server._driver.send_encoded(Kind.REPLY, SEQ.pack(3) + CANCELLED_REPLY)
        with pytest.raises(CancelledCommandError):
            future.result(10.0)
        ranks.gate.set()
        assert driver.call(change("d")) == 3
        ranks.lose()
        assert driver.call(change("e")) == 4
        assert ranks.state == changes("abde")


def test_a_cancellation_during_a_loss_ends_in_time(ranks: FakeRanks) -> None:
    with driven(ranks) as driver:
        ranks.gate.clear()
        futures = [driver.submit(change(number)) for number in range(3)]
        answers: list[bool] = []
        ranks.lose()
        thread = threading.Thread(target=lambda: answers.append(futures[2].cancel()))
        thread.start()
        ranks.gate.set()
        thread.join(20.0)
        assert answers == [False] or futures[2].cancelled()
        wait([each for each in futures if not each.cancelled()], 10.0)
        assert all(each.done() for each in futures)


def test_closing_is_idempotent_and_says_so_to_who_still_waits(ranks: FakeRanks) -> None:
    driver = Driver.launch(ranks, BusConfig())
    driver.call(change(1))
    ranks.gate.clear()
    future = driver.submit(change(2))
    threading.Timer(0.2, ranks.gate.set).start()
    driver.close()
    driver.close()
    with pytest.raises(CancelledCommandError, match="closed before ZeroGrad was done"):
        future.result(0.0)
    for function in (lambda: driver.submit(Ping()), lambda: driver.call(change(3)), driver.ping):
        with pytest.raises(BusError, match="this driver is closed"):
            function()
    assert ranks.rank is None
    # The end would wait behind what is given up: ranks are ended instead of being told.
    assert not any(isinstance(each, Stop) for each in ranks.heard)
    assert not driver.history.folder.exists()


def test_ranks_that_have_nothing_to_do_are_told_to_stop(ranks: FakeRanks) -> None:
    driver = Driver.launch(ranks, BusConfig())
    driver.call(change(1))
    driver.close()
    assert isinstance(ranks.heard[-1], Stop)


def test_closing_while_ranks_do_not_start_again_ends_soon(ranks: FakeRanks) -> None:
    driver, events = Driver.launch(ranks, BusConfig()), []
    driver.observers.add(lambda event: events.append(event.kind))
    driver.call(change(1))

    def start() -> Address:
        raise RankError("no rank could be forked")

    ranks.start = start  # type: ignore[method-assign]
    ranks.lose()
    wait_until(lambda: driver.losses)
    began = time.monotonic()
    driver.close()
    assert time.monotonic() - began < 5.0
    assert "recovered" not in events


def test_many_threads_may_close_it(ranks: FakeRanks) -> None:
    driver = Driver.launch(ranks, BusConfig())
    threads = [threading.Thread(target=driver.close) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(20.0)
    assert not any(each.is_alive() for each in threads)


def test_no_future_is_left_when_threads_submit_while_it_closes(ranks: FakeRanks) -> None:
    for _ in range(5):
        futures: list[Future[Any]] = []
        driver = Driver.launch(ranks, BusConfig())

        def submit(driver: Driver = driver, futures: list[Future[Any]] = futures) -> None:
            try:
                while True:
                    futures.append(driver.submit(Ping()))
            except BusError:
                return

        threads = [threading.Thread(target=submit) for _ in range(4)]
        for each in threads:
            each.start()
        time.sleep(0.05)
        driver.close()
        for each in threads:
            each.join(10.0)
        assert not wait(futures, 5.0).not_done


def test_no_future_is_left_when_threads_submit_while_it_gives_up(ranks: FakeRanks) -> None:
    config = BusConfig(recovery=RecoveryPolicy(max_restarts=0))
    for _ in range(5):
        futures: list[Future[Any]] = []
        with driven(ranks, config) as driver:

            def submit(driver: Driver = driver, futures: list[Future[Any]] = futures) -> None:
                try:
                    while True:
                        futures.append(driver.submit(Ping()))
                except BusError:
                    return

            threads = [threading.Thread(target=submit) for _ in range(4)]
            for each in threads:
                each.start()
            time.sleep(0.05)
            ranks.lose("it is gone")
            for each in threads:
                each.join(10.0)
            assert not wait(futures, 5.0).not_done


def test_a_finalizers_command_is_sent_before_the_next_one(ranks: FakeRanks) -> None:
    with driven(ranks) as driver:
        driver.submit_soon(change("first"))
        assert driver.call(change("second")) == 2
        assert ranks.state == changes(["first", "second"])


def test_a_command_that_cannot_be_noted_is_not_done(
    ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with driven(ranks) as driver:
        driver.call(change(1))

        def full(*anything: Any, **options: Any) -> None:
            raise BusError("the command was not accepted: the disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(driver.history._journal, "append", full)
            with pytest.raises(BusError, match="not accepted"):
                driver.submit(change(2))
            assert driver.call(Ping()) is None  # which nobody would do again
        assert driver.call(change(3)) == 2
        assert ranks.state == changes([1, 3])
