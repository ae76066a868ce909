"""Frames on a socket: random, cut, alien and oversized ones are BusError, and none hangs."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.bus.frames import VERSION, FrameSocket, Kind
from megatrain.errors import BusError

HEADER = struct.Struct("<4sHBBQ")
CAP = 1 << 16


@contextlib.contextmanager
def pair(cap: int = CAP) -> Iterator[tuple[socket.socket, FrameSocket]]:
    """Give a raw end and the end that reads frames, which waits two seconds at most."""
    raw, other = socket.socketpair()
    frames = FrameSocket(other, cap)
    frames._socket.settimeout(2.0)
    try:
        yield raw, frames
    finally:
        raw.close()
        frames.close()


def received(data: bytes, cap: int = CAP) -> Any:
    """Return what comes of these bytes, after which the sender leaves."""
    with pair(cap) as (raw, frames):
        raw.sendall(data)
        raw.close()
        return frames.receive()


@pytest.mark.parametrize("size", [0, 1, CAP - 100, CAP, 1 << 20])
def test_a_frame_arrives_whole(size: int) -> None:
    with pair(1 << 21) as (raw, frames):
        sender = FrameSocket(raw, 1 << 21)
        thread = threading.Thread(target=sender.send, args=(Kind.REPLY, b"x" * size))
        thread.start()
        assert frames.receive() == (Kind.REPLY, b"x" * size)
        thread.join()


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (HEADER.pack(b"HTTP", VERSION, 4, 0, 0), "no frame of this protocol"),
        (HEADER.pack(b"MTRB", VERSION, 4, 1, 0), "no frame of this protocol"),
        (HEADER.pack(b"MTRB", VERSION + 1, 4, 0, 0), f"speaks version {VERSION + 1} .* {VERSION}"),
        (HEADER.pack(b"MTRB", 0, 4, 0, 0), "speaks version 0"),
        (HEADER.pack(b"MTRB", VERSION, 99, 0, 0), "unknown kind of frame: 99"),
        (HEADER.pack(b"MTRB", VERSION, 4, 0, CAP + 1), f"at most {CAP} bytes: {CAP + 1}"),
        (HEADER.pack(b"MTRB", VERSION, 4, 0, 2**64 - 1), "at most"),
        (HEADER.pack(b"MTRB", VERSION, 4, 0, 0), "malformed"),
        (HEADER.pack(b"MTRB", VERSION, 4, 0, 10) + b"123", "closed the connection"),
        (b"GET / HTTP/1.1\r\nHost: ranks\r\n\r\n", "no frame of this protocol"),
        (b"MTRB", "closed the connection"),
        (b"", "closed the connection"),
    ],
)
def test_what_is_no_frame_is_refused_and_says_why(header: bytes, text: str) -> None:
    with pytest.raises(BusError, match=text):
        received(header)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=64))
def test_random_bytes_are_a_bus_error(data: bytes) -> None:
    for each in (data, b"MTRB" + data, HEADER.pack(b"MTRB", VERSION, 4, 0, len(data)) + data):
        with pytest.raises(BusError):
            received(each + b"\xc1")


def test_a_frame_that_is_cut_anywhere_is_a_bus_error() -> None:
    with pair() as (raw, frames):
        FrameSocket(raw, CAP).send(Kind.COMMAND, {"a": [1, 2, 3]})
        whole = frames._socket.recv(CAP)
    for size in range(len(whole)):
        with pytest.raises(BusError, match="closed"):
            received(whole[:size])


def test_what_is_too_large_is_not_sent() -> None:
    with pair() as (raw, frames):
        with pytest.raises(BusError, match=f"at most {CAP} bytes") as error:
            frames.send(Kind.COMMAND, b"x" * CAP)
        assert "max_message_bytes" in str(error.value)
        frames.send(Kind.COMMAND, b"x")
        assert FrameSocket(raw, CAP).receive() == (Kind.COMMAND, b"x")


def test_an_announced_size_above_the_cap_takes_no_memory_and_no_time() -> None:
    with pair() as (raw, frames):
        raw.sendall(HEADER.pack(b"MTRB", VERSION, 4, 0, 1 << 60))
        start = time.monotonic()
        with pytest.raises(BusError, match="at most"):
            frames.receive()
        assert time.monotonic() - start < 1.0


def test_frames_of_many_threads_do_not_mix() -> None:
    count, threads = 40, 6
    with pair(1 << 20) as (raw, frames):
        sender = FrameSocket(raw, 1 << 20)

        def send(number: int) -> None:
            for index in range(count):
                sender.send(Kind.REPLY, [number, index, bytes([number]) * (index * 4000)])

        workers = [threading.Thread(target=send, args=(n,)) for n in range(threads)]
        for each in workers:
            each.start()
        seen: dict[int, int] = dict.fromkeys(range(threads), 0)
        for _ in range(count * threads):
            number, index, data = frames.receive()[1]
            assert (index, data) == (seen[number], bytes([number]) * (index * 4000))
            seen[number] += 1
        for each in workers:
            each.join()


def test_a_reader_whose_socket_is_closed_gets_a_bus_error() -> None:
    with pair() as (_, frames):
        frames._socket.settimeout(None)
        found: list[BaseException] = []

        def read() -> None:
            try:
                frames.receive()
            except BusError as error:
                found.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.05)
        frames.close()
        reader.join(5.0)
        assert found


def test_a_sender_that_nobody_reads_from_gets_a_bus_error_in_time() -> None:
    raw, other = socket.socketpair()
    frames = FrameSocket(other, 1 << 24)
    frames._socket.settimeout(0.2)
    with raw, contextlib.closing(frames), pytest.raises(BusError, match="connection was lost"):
        frames.send(Kind.REPLY, b"x" * (1 << 23))
