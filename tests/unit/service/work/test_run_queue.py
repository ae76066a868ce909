"""A run's requests are done in the order of their numbers, and a gap does not wait for ever."""

from hypothesis import given
from hypothesis import strategies as st

from megatrain.service.work.run_queue import RunQueue


def test_chunks_that_come_in_another_order_are_done_in_theirs() -> None:
    queue: RunQueue[str] = RunQueue(1)
    for seq in (2, 3, 1):
        assert queue.put(seq, f"chunk {seq}", 0.0)
    assert [queue.pop(0.0) for _ in range(3)] == ["chunk 1", "chunk 2", "chunk 3"]
    assert queue.next_seq == 4
    assert queue.peek() is None


def test_a_number_that_is_over_is_not_taken_again() -> None:
    queue: RunQueue[str] = RunQueue(1)
    queue.put(1, "first", 0.0)
    queue.pop(0.0)
    assert not queue.put(1, "again", 0.0)
    assert len(queue) == 0


def test_a_gap_is_noted_and_what_waits_behind_it_given_up() -> None:
    queue: RunQueue[str] = RunQueue(1)
    queue.put(3, "third", 5.0)
    queue.put(5, "fifth", 6.0)
    assert queue.peek() is None
    assert queue.gap_since == 5.0
    assert queue.missing() == [1, 2, 4]
    assert queue.give_up_gap(70.0) == ["third", "fifth"]
    assert queue.gap_since is None
    assert queue.next_seq == 6
    assert not queue.put(2, "too late", 71.0)
    assert queue.put(6, "sixth", 71.0)
    assert queue.pop(71.0) == "sixth"


def test_a_gap_that_is_filled_in_time_is_none() -> None:
    queue: RunQueue[str] = RunQueue(1)
    queue.put(2, "second", 5.0)
    queue.put(1, "first", 6.0)
    assert queue.gap_since is None
    assert queue.give_up_gap(100.0) == []
    assert queue.pop(6.0) == "first"


def test_numbers_that_were_done_before_are_passed_over() -> None:
    queue: RunQueue[str] = RunQueue(4, done=[5, 6, 9])
    assert queue.put(4, "fourth", 0.0)
    assert not queue.put(5, "again", 0.0)
    assert queue.pop(0.0) == "fourth"
    assert queue.next_seq == 7


def test_a_new_gap_behind_an_old_one_has_its_own_time() -> None:
    queue: RunQueue[str] = RunQueue(1)
    queue.put(2, "second", 5.0)
    queue.put(4, "fourth", 5.0)
    queue.put(1, "first", 20.0)
    queue.pop(20.0)
    queue.pop(21.0)
    assert queue.gap_since == 21.0


@given(st.permutations(range(1, 12)))
def test_any_order_of_arrival_gives_the_order_of_numbers(order: list[int]) -> None:
    queue: RunQueue[int] = RunQueue(1)
    done = []
    for seq in order:
        queue.put(seq, seq, 0.0)
        while queue.peek() is not None:
            done.append(queue.pop(0.0))
    assert done == list(range(1, 12))
    assert queue.gap_since is None
