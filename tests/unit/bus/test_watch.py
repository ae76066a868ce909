"""Who is silent, late, or alone with an error; the cause is named and not who waits for it."""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from megatrain.bus import pulse as pulse_module
from megatrain.bus.beat import Beat, key
from megatrain.bus.pulse import Pulse
from megatrain.bus.watch import Loss, Watch

OTHER_THREAD = 'Thread 0x01 [beat] (most recent call first):\n  File "/lib/threading.py", line 1\n'
WAITS = (
    OTHER_THREAD + "\nCurrent thread 0x02 (most recent call first):\n"
    '  File "/x/torch/distributed/distributed_c10d.py", line 9 in all_reduce\n'
    '  File "/x/user.py", line 3 in step\n'
)
WAITS_IN_PIPELINE = (
    OTHER_THREAD + "\nThread 0x02 (most recent call first):\n"
    '  File "/x/megatron/core/pipeline_parallel/p2p_communication.py", line 9 in recv\n'
    '  File "/x/user.py", line 3 in step\n'
)
WORKS = (
    '  File "/x/torch/distributed/elsewhere.py", line 1\n\nThread 0x02 (most recent call first):\n'
    '  File "/x/user.py", line 3 in endless\n'
    '  File "/x/torch/distributed/distributed_c10d.py", line 9 in wrapper\n'
)


class Store:
    """A store of the ranks, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.is_gone = False

    def set(self, name: str, value: str) -> None:
        if self.is_gone:
            raise RuntimeError("connection reset")
        self.values[name] = value.encode()

    def get(self, name: str) -> bytes:
        return self.values[name]

    def multi_get(self, names: Sequence[str]) -> list[bytes]:
        if self.is_gone:
            raise RuntimeError("connection reset")
        return [self.values[name] for name in names]

    def tell(self, beat: Beat) -> None:
        self.set(key(beat.rank), json.dumps(asdict(beat)))


@pytest.fixture
def watch() -> Any:
    """A watch that has stopped watching by itself, with a bound of four seconds."""
    watch = Watch(Store(), [], timeout_s=4.0, lost=lambda loss: None)
    watch.close()
    return watch


def beat(rank: int, count: int = 1, **more: Any) -> Beat:
    return Beat(rank, f"host{rank}", 100 + rank, count, **more)


def busy(rank: int, count: int = 1, **more: Any) -> Beat:
    values = {"seq": 7, "command": "Step", "phase": "optimizer step", "deadline_s": 10.0} | more
    return beat(rank, count, **values)


def test_ranks_that_beat_are_well(watch: Watch) -> None:
    for moment in range(20):
        assert watch.judge([beat(0, moment), busy(1, moment)], float(moment)) is None


def test_a_silent_rank_is_named_with_what_it_did(watch: Watch) -> None:
    assert watch.judge([beat(0, 1), busy(1, 1), beat(2, 1)], 0.0) is None
    assert watch.judge([beat(0, 2), busy(1, 1), beat(2, 2)], 4.0) is None
    loss = watch.judge([beat(0, 3), busy(1, 1), beat(2, 3)], 4.1)
    assert loss is not None
    assert loss.ranks == (1,)
    assert loss.text == (
        "rank 1 (host host1, pid 101) has given no sign of life for 4.1 s (bound 4 s), in Step "
        "(command 7), phase optimizer step"
    )
    assert not loss.is_late


def test_all_silent_ranks_are_named(watch: Watch) -> None:
    watch.judge([beat(0), beat(1, seq=3), beat(2)], 0.0)
    loss = watch.judge([beat(0, 2), beat(1, seq=3), beat(2)], 5.0)
    assert loss is not None
    assert loss.ranks == (1, 2)
    assert "idle after command 3" in loss.text
    assert loss.text.endswith("idle")


def test_a_beat_that_comes_late_but_in_time_starts_the_clock_again(watch: Watch) -> None:
    for moment, count in ((0.0, 1), (3.9, 2), (7.8, 3), (11.7, 4)):
        assert watch.judge([beat(0, count)], moment) is None
    assert watch.judge([beat(0, 4)], 15.0) is None
    assert watch.judge([beat(0, 4)], 15.8) is not None


def test_a_late_rank_is_named_once_its_stack_is_there(watch: Watch) -> None:
    late = {"running_s": 10.5}
    assert watch.judge([busy(0, running_s=9.9)], 0.0) is None
    assert watch.judge([busy(0, 2, **late)], 1.0) is None
    loss = watch.judge([busy(0, 3, **late, stack=WORKS)], 2.0)
    assert loss is not None
    assert loss.is_late
    assert "rank 0 (host host0, pid 100) is alive but was not done within 10 s" in loss.text
    assert "in Step (command 7), phase optimizer step" in loss.text
    assert "endless" in loss.stacks


@pytest.mark.parametrize("waits", [WAITS, WAITS_IN_PIPELINE])
def test_of_late_ranks_the_one_that_does_not_wait_for_others_is_the_cause(
    watch: Watch, waits: str
) -> None:
    late = {"running_s": 11.0}
    beats = [busy(rank, 1, **late, stack=waits) for rank in (0, 1, 3)]
    beats.insert(2, busy(2, 1, **late, stack=WORKS))
    loss = watch.judge(beats, 0.0)
    assert loss is not None
    assert loss.ranks == (2,)
    assert "rank 2" in loss.stacks
    assert "rank 1" not in loss.stacks


def test_if_all_late_ranks_wait_all_are_named(watch: Watch) -> None:
    loss = watch.judge([busy(r, running_s=11.0, stack=WAITS) for r in (0, 1)], 0.0)
    assert loss is not None
    assert loss.ranks == (0, 1)


def test_the_cause_is_not_named_before_all_late_ranks_have_told_their_stacks(
    watch: Watch,
) -> None:
    beats = [busy(0, running_s=11.0, stack=WAITS), busy(1, running_s=10.1)]
    assert watch.judge(beats, 0.0) is None


def test_a_rank_that_waits_is_not_named_before_the_others_have_said_that_they_are_late(
    watch: Watch,
) -> None:
    """Beats come at different moments: the cause may have told its last one in time."""
    waits, cause = busy(0, running_s=10.2, stack=WAITS), busy(1, running_s=9.8)
    assert watch.judge([waits, cause], 0.0) is None
    late = busy(1, 2, running_s=10.6, stack=WORKS)
    loss = watch.judge([waits, late, beat(2, seq=6)], 0.5)
    assert loss is not None
    assert loss.ranks == (1,)


def test_between_commands_nobody_is_late(watch: Watch) -> None:
    assert watch.judge([beat(0, running_s=99.0, deadline_s=10.0, stack=WORKS)], 0.0) is None


def test_a_rank_that_failed_alone_is_named_after_a_while(watch: Watch) -> None:
    for moment, count in ((10.0, 1), (12.0, 2), (13.9, 3)):
        assert watch.judge([busy(0, count), busy(1, count, failed=True)], moment) is None
    failed = busy(1, 4, failed=True, error="ValueError: its own mistake")
    loss = watch.judge([busy(0, 4), failed], 14.0)
    assert loss is not None
    assert loss.ranks == (1,)
    assert "rank 1 (host host1, pid 101) failed, and the others wait for it" in loss.text
    assert loss.text.endswith("ValueError: its own mistake")


def test_ranks_that_all_failed_will_say_so_themselves(watch: Watch) -> None:
    for moment in range(0, 20, 2):
        beats = [busy(rank, moment, failed=True) for rank in (0, 1)]
        assert watch.judge(beats, float(moment)) is None


def test_a_failure_that_the_others_heard_of_starts_the_clock_again(watch: Watch) -> None:
    assert watch.judge([busy(0, 1), busy(1, 1, failed=True)], 10.0) is None
    assert watch.judge([busy(0, 2), busy(1, 2)], 13.0) is None
    assert watch.judge([busy(0, 3), busy(1, 3, failed=True)], 15.0) is None
    assert watch.judge([busy(0, 4), busy(1, 4, failed=True)], 18.0) is None
    assert watch.judge([busy(0, 5), busy(1, 5, failed=True)], 19.0) is not None


def test_a_watch_says_once_what_is_wrong_and_hands_on_what_it_hears() -> None:
    store, losses, heard = Store(), [], []
    store.tell(beat(0))
    Watch(store, [0], timeout_s=0.3, lost=losses.append, heard=heard.append)
    limit = time.monotonic() + 5.0
    while not losses and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.3)
    assert [loss.ranks for loss in losses] == [(0,)]
    assert heard[0] == [beat(0)]


def test_a_store_that_is_gone_is_a_loss() -> None:
    store, losses, said = Store(), [], threading.Event()

    def lost(loss: Loss) -> None:
        losses.append(loss)
        said.set()

    store.tell(beat(0))
    Watch(store, [0], timeout_s=0.3, lost=lost)
    store.is_gone = True
    assert said.wait(5.0)
    assert "store is gone: connection reset" in losses[0].text


def test_a_watch_that_is_closed_says_nothing() -> None:
    store, losses = Store(), []
    store.tell(beat(0))
    watch = Watch(store, [0], timeout_s=0.2, lost=losses.append)
    watch.close()
    store.is_gone = True
    time.sleep(0.4)
    assert losses == []


def told(store: Store) -> dict[str, Any]:
    return json.loads(store.values[key(3)])


def test_a_pulse_tells_what_its_rank_does_and_takes_a_stack_when_it_is_late() -> None:
    store = Store()
    pulse = Pulse(store, 3, interval_s=0.02)
    try:
        assert told(store)["count"] == 1
        pulse.begin(5, "a command", 0.05)
        pulse.name("Step")
        limit = time.monotonic() + 5.0
        while not told(store)["stack"] and time.monotonic() < limit:
            time.sleep(0.01)
        late = told(store)
        assert (late["seq"], late["command"], late["phase"]) == (5, "Step", "validating")
        assert late["running_s"] > 0.05
        assert "test_a_pulse_tells_what_its_rank_does" in late["stack"]
        assert late["resident_bytes"] > 1 << 20
        pulse.fail()
        pulse.end(tokens=12)
        pulse.begin(6, "a command", 60.0)
        limit = time.monotonic() + 5.0
        while told(store)["seq"] != 6 and time.monotonic() < limit:
            time.sleep(0.01)
        after = told(store)
        assert (after["seq"], after["tokens"], after["failed"], after["stack"]) == (
            6,
            12,
            False,
            "",
        )
        pulse.end()
    finally:
        pulse.close()


def test_the_main_thread_is_in_the_stack_of_a_process_with_more_threads_than_are_dumped() -> None:
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(120)]
    for thread in threads:
        thread.start()
    try:
        last = pulse_module._stack().strip().split("\n\n")[-1]
    finally:
        done.set()
    assert "test_the_main_thread_is_in_the_stack" in last
    assert last.startswith("Thread 0x")
