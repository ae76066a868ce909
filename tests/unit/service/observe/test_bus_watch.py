"""Commands' times are added up where they were submitted, and losses are counted."""

import threading

import pytest

from megatrain.bus.events import Event, Observers
from megatrain.service.observe.bus_watch import BusWatch, charged, charged_to
from megatrain.service.observe.timing import Spent


def done(seq: int, kind: str = "done") -> Event:
    return Event(kind, seq, "Ping", seconds=2.0, phases={"validate": 0.5, "execute": 1.0})


def test_a_commands_time_goes_to_who_submitted_it():
    watch, observers, mine, other = BusWatch(), Observers(), Spent(), Spent()
    watch.attach(observers)
    for seq, spent in ((1, mine), (2, other), (3, mine), (4, None)):
        with watch.submitting(spent):
            observers.tell(Event("accepted", seq, "Ping"))
    # Another thread's command is nobody's, whatever this one is submitting.
    with watch.submitting(other):
        thread = threading.Thread(target=observers.tell, args=(Event("accepted", 5, "Ping"),))
        thread.start()
        thread.join()
    for seq in (1, 2, 4, 5):
        observers.tell(done(seq))
    observers.tell(done(3, "failed"))
    assert (mine.bus_s, mine.ranks_s) == pytest.approx((4.0, 3.0))
    assert (other.bus_s, other.ranks_s) == pytest.approx((2.0, 1.5))


def test_a_new_driver_knows_none_of_the_old_ones_commands():
    watch, spent = BusWatch(), Spent()
    first, second = Observers(), Observers()
    watch.attach(first)
    with watch.submitting(spent):
        first.tell(Event("accepted", 1, "Ping"))
    watch.attach(second)
    second.tell(done(1))
    assert spent.bus_s == 0.0


def test_losses_are_counted():
    watch, observers = BusWatch(), Observers()
    watch.attach(observers)
    observers.tell(Event("lost", text="rank 1"))
    observers.tell(Event("recovered", seconds=3.0))
    assert (watch.losses, watch.recoveries, watch.recovery_s) == (1, 1, 3.0)


def test_charges_are_of_the_block():
    spent = Spent()
    with charged_to(spent):
        assert charged() is spent
    assert charged() is None
