"""Rank 0's door: one driver at a time, each command once, replies until they are acknowledged."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.bus.address import Address
from megatrain.bus.codec import decode, encode
from megatrain.bus.commands import Ping, RestoreSnapshot
from megatrain.bus.frames import VERSION, Kind
from megatrain.bus.jobs import SEQ, Job
from megatrain.bus.link import Link
from megatrain.bus.server import MAX_STRANGERS, Server
from megatrain.config.bus import BusConfig
from megatrain.errors import BusError
from tests.fixtures.bus_server import Visitor, wait_until, welcome

CONFIG = BusConfig()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(Address(path=str(tmp_path / "s")), CONFIG, welcome("epoch"))
    yield server
    server.close()


class Caller:
    """A driver's end that notes what it hears."""

    def __init__(self, server: Server, session: str = "session") -> None:
        self.replies: list[tuple[int, Any]] = []
        self.cancelled: list[tuple[int, bool]] = []
        self.link = self._connect(server, session)
        self.link.listen(
            lambda seq, reply, size: self.replies.append((seq, reply)),
            lambda seq, in_time: self.cancelled.append((seq, in_time)),
        )

    @staticmethod
    def _connect(server: Server, session: str) -> Link:
        limit = time.monotonic() + 5.0
        while True:
            try:
                return Link(server.address, CONFIG, session)
            except BusError:  # the server has not seen yet that the one before is gone
                if time.monotonic() > limit:
                    raise
                time.sleep(0.01)

    def send(self, seq: int, acknowledged: int = 0) -> None:
        job = Job(seq, 60.0, encode(Ping(model=str(seq))), acknowledged)
        self.link.send(Kind.COMMAND, job.pack())

    def cancel(self, seq: int) -> None:
        self.link.send(Kind.CANCEL, SEQ.pack(seq))

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *error: object) -> None:
        self.link.close()
        wait_until(lambda: self.link.error is not None)


def answer(server: Server) -> int:
    """Do the next command and return its number."""
    job = server.next(2.0)
    assert job is not None
    server.reply(job, encode(job.seq))
    return job.seq


def queued(server: Server) -> list[int]:
    """Take all commands that wait."""
    found = []
    while (job := server.next(0.1)) is not None:
        found.append(job.seq)
    return found


def test_commands_come_in_order_and_replies_go_back(server: Server) -> None:
    with Caller(server) as caller:
        for seq in (1, 2, 3):
            caller.send(seq)
        assert [answer(server) for _ in range(3)] == [1, 2, 3]
        wait_until(lambda: caller.replies == [(1, 1), (2, 2), (3, 3)])


def test_nothing_comes_of_nothing(server: Server) -> None:
    start = time.monotonic()
    assert server.next(0.1) is None
    assert 0.05 < time.monotonic() - start < 1.0


def test_a_second_driver_is_refused_while_one_is_there(server: Server) -> None:
    with Caller(server):
        for session in ("session", "another"):
            with pytest.raises(BusError, match="another driver is connected"):
                Link(server.address, CONFIG, session)
    with Caller(server, "another") as other:
        assert other.link.welcome.epoch == "epoch-another"


def test_of_many_that_come_at_once_one_is_let_in(server: Server) -> None:
    links: list[Link] = []
    refused: list[BusError] = []

    def enter(number: int) -> None:
        try:
            links.append(Link(server.address, CONFIG, str(number)))
        except BusError as error:
            refused.append(error)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (len(links), len(refused)) == (1, 7)
    links[0].close()


def test_what_was_accepted_is_not_accepted_again(server: Server) -> None:
    with Caller(server) as caller:
        caller.send(1)
        caller.send(2)
        wait_until(lambda: server.queued() == 2)
    with Caller(server) as caller:
        assert caller.link.welcome.epoch == "epoch-session"
        assert caller.link.welcome.last_seq == 2
        for seq in (1, 2, 3):
            caller.send(seq)
        wait_until(lambda: server.queued() == 3)
        assert queued(server) == [1, 2, 3]


def test_a_reply_that_was_lost_is_sent_again_and_the_command_is_not_done_again(
    server: Server,
) -> None:
    with Caller(server) as caller:
        caller.send(1)
        job = server.next(2.0)
    assert job is not None
    wait_until(lambda: server._driver is None)
    server.reply(job, encode("done while nobody was there"))
    with Caller(server) as caller:
        caller.send(1)
        wait_until(lambda: caller.replies == [(1, "done while nobody was there")])
        caller.send(1)
        wait_until(lambda: len(caller.replies) == 2)
        assert queued(server) == []


def test_replies_are_kept_until_they_are_acknowledged(server: Server) -> None:
    with Caller(server) as caller:
        for seq in range(1, 6):
            caller.send(seq)
            answer(server)
        assert sorted(server._replies) == [1, 2, 3, 4, 5]
        caller.send(6, acknowledged=4)
        answer(server)
        assert sorted(server._replies) == [5, 6]


def test_cancelled_in_time_is_never_done(server: Server) -> None:
    with Caller(server) as caller:
        for seq in (1, 2, 3):
            caller.send(seq)
        caller.cancel(2)
        wait_until(lambda: caller.cancelled == [(2, True)])
        assert queued(server) == [1, 3]
        wait_until(lambda: len(caller.replies) == 1)
        assert caller.replies[0][1]["failure"].kind == "CancelledCommandError"


@pytest.mark.parametrize("seq", [0, 1, 9, 2**64 - 1])
def test_cancelled_too_late_or_unknown_is_said_so(server: Server, seq: int) -> None:
    with Caller(server) as caller:
        caller.send(1)
        assert answer(server) == 1
        caller.cancel(seq)
        wait_until(lambda: caller.cancelled == [(seq, False)])


def test_a_command_that_was_cancelled_stays_so_after_a_new_connection(server: Server) -> None:
    with Caller(server) as caller:
        caller.send(1)
        caller.cancel(1)
        wait_until(lambda: caller.cancelled)
    with Caller(server) as caller:
        caller.send(1)
        wait_until(lambda: caller.replies)
        assert caller.replies[0][1]["failure"].kind == "CancelledCommandError"
        assert queued(server) == []


def test_another_session_begins_anew_and_the_ranks_forget(server: Server) -> None:
    with Caller(server) as caller:
        caller.send(1)
        answer(server)
        caller.send(2)
        wait_until(lambda: server.queued() == 1)
    with Caller(server, "another") as other:
        assert other.link.welcome.last_seq == 0
        assert other.link.welcome.epoch == "epoch-another"
        other.send(1)
        first, second = server.next(2.0), server.next(2.0)
        assert first is not None
        assert second is not None
        assert decode(first.payload) == RestoreSnapshot(directory=None)
        assert decode(second.payload) == Ping(model="1")
        server.reply(first, encode("unheard"))
        server.reply(second, encode("heard"))
        wait_until(lambda: other.replies == [(1, "heard")])


def test_a_reply_to_the_session_before_goes_nowhere(server: Server) -> None:
    with Caller(server) as caller:
        caller.send(1)
        old = server.next(2.0)
    with Caller(server, "another") as other:
        assert old is not None
        server.reply(old, encode("old"))
        other.send(1)
        queued(server)
        assert other.replies == []
        assert server._replies == {}


def test_a_cancellation_holds_though_the_session_before_had_the_same_number(
    server: Server,
) -> None:
    with Caller(server) as caller:
        for seq in (1, 2):
            caller.send(seq)
        wait_until(lambda: server.queued() == 2)
    with Caller(server, "another") as other:
        for seq in (1, 2, 3):
            other.send(seq)
        other.cancel(2)
        wait_until(lambda: other.cancelled == [(2, True)])
        assert queued(server) == [0, 1, 3]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Kind.COMMAND, b"short"),
        (Kind.COMMAND, b""),
        (Kind.CANCEL, b"short"),
        (Kind.CANCEL, b"x" * 9),
        (Kind.HELLO, encode({})),
        (Kind.REPLY, encode({})),
        (Kind.LOST, encode({})),
    ],
)
def test_what_no_driver_sends_ends_its_connection_alone(
    server: Server, kind: Kind, body: bytes
) -> None:
    with Caller(server) as caller:
        caller.link.send(kind, body)
        wait_until(lambda: caller.link.error is not None)
    with Caller(server) as caller:
        caller.send(1)
        assert answer(server) == 1


@settings(deadline=None, max_examples=25)
@given(st.binary(max_size=100))
def test_random_bytes_of_a_stranger_harm_nobody(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    address = Address(path=str(tmp_path_factory.mktemp("s") / "s"))
    server = Server(address, CONFIG, welcome())
    try:
        header = struct.pack("<4sHBBQ", b"MTRB", VERSION, Kind.HELLO, 0, len(data))
        for each in (data, header + data):
            with Visitor(address) as visitor:
                with contextlib.suppress(OSError):
                    visitor.socket.sendall(each)
                    visitor.socket.shutdown(socket.SHUT_WR)
                assert visitor.ends_within(5.0)
        with Caller(server) as caller:
            caller.send(1)
            assert answer(server) == 1
    finally:
        server.close()


def test_a_silent_stranger_is_left_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatrain.bus.server.HANDSHAKE_S", 0.3)
    with Visitor(server.address) as visitor:
        assert visitor.ends_within(2.0)


def test_a_stranger_that_sends_a_byte_now_and_then_is_left_in_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatrain.bus.server.HANDSHAKE_S", 0.4)
    header = struct.pack("<4sHBBQ", b"MTRB", VERSION, Kind.HELLO, 0, 1000)
    with Visitor(server.address) as visitor:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in header + bytes(1000):
                visitor.socket.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - start < 2.0


def test_strangers_do_not_keep_a_driver_out_for_long(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatrain.bus.server.HANDSHAKE_S", 0.5)
    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(Visitor(server.address)) for _ in range(MAX_STRANGERS + 4)]
        assert visitors[-1].ends_within(0.4)  # one too many
        assert all(each.ends_within(2.0) for each in visitors)
        with Caller(server) as caller:
            caller.send(1)
            assert answer(server) == 1


def test_a_closed_server_lets_nobody_in(tmp_path: Path) -> None:
    server = Server(Address(path=str(tmp_path / "s")), CONFIG, welcome())
    with Caller(server) as caller:
        server.close()
        wait_until(lambda: caller.link.error is not None)
    with pytest.raises(OSError):
        Link(server.address, CONFIG, "session")


def test_a_reply_that_is_too_large_is_an_error_and_no_silence(tmp_path: Path) -> None:
    config = BusConfig(max_message_bytes=1 << 16)
    server = Server(Address(path=str(tmp_path / "s")), config, welcome())
    with Caller(server) as caller:
        caller.send(1)
        job = server.next(2.0)
        assert job is not None
        server.reply(job, encode({"value": bytes(1 << 17), "trained": [], "times": {}}))
        wait_until(lambda: caller.replies, 2.0)
        assert "max_message_bytes" in str(caller.replies[0][1]["failure"].hint)
        caller.send(2)
        assert answer(server) == 2
    server.close()


def test_health_and_losses_are_heard(server: Server) -> None:
    server.tell(Kind.HEALTH, encode({}))  # nobody is there: nothing happens
    with Caller(server) as caller:
        server.tell(Kind.HEALTH, encode({"beats": [], "queued": 0}))
        wait_until(lambda: caller.link.health == {"beats": [], "queued": 0})
        server.tell(Kind.LOST, encode({"text": "rank 1 is gone"}))
        wait_until(lambda: caller.link.lost == {"text": "rank 1 is gone"})
