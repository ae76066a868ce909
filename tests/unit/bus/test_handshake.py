"""Both ends prove that they have the token, and neither says it."""

import contextlib
import hmac
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatrain.bus.codec import encode
from megatrain.bus.frames import HANDSHAKE_BYTES, FrameSocket, Kind
from megatrain.bus.handshake import admit, enter
from megatrain.errors import BusError
from tests.fixtures.bus_server import welcome

TOKEN, OTHER = b"t" * 32, b"u" * 32
WELCOME = welcome("epoch")


@contextlib.contextmanager
def ends() -> Iterator[tuple[FrameSocket, FrameSocket]]:
    """Give the ranks' end and the driver's end of a connection."""
    ours, theirs = (FrameSocket(each, 1 << 24) for each in socket.socketpair())
    for each in (ours, theirs):
        each._socket.settimeout(5.0)
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


def meet(
    server: Callable[[FrameSocket], Any], driver: Callable[[FrameSocket], Any]
) -> tuple[Any, Any]:
    """Run both ends; return what each returned or raised."""
    results: list[Any] = [None, None]

    def run(place: int, function: Callable[[FrameSocket], Any], link: FrameSocket) -> None:
        try:
            results[place] = function(link)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results[place] = error
            link.close()

    with ends() as (ours, theirs):
        thread = threading.Thread(target=run, args=(0, server, ours))
        thread.start()
        run(1, driver, theirs)
        thread.join()
    return results[0], results[1]


def test_both_are_let_in_with_one_token_and_frames_may_be_large_again() -> None:
    caps = []

    def server(link: FrameSocket) -> str:
        session = admit(link, TOKEN, lambda session: WELCOME)
        caps.append(link.max_bytes)
        return session

    def driver(link: FrameSocket) -> Any:
        found = enter(link, TOKEN, "a session")
        caps.append(link.max_bytes)
        return found

    assert meet(server, driver) == ("a session", WELCOME)
    assert caps == [1 << 24, 1 << 24]


def test_a_wrong_token_is_refused_before_anybody_is_asked() -> None:
    asked: list[str] = []
    server, driver = meet(
        lambda link: admit(link, TOKEN, lambda session: asked.append(session) or WELCOME),
        lambda link: enter(link, OTHER, "s"),
    )
    assert isinstance(server, BusError)
    assert isinstance(driver, BusError)
    assert "the token is another one than the ranks'" in str(driver)
    assert not asked


def test_a_listener_without_the_token_is_left() -> None:
    def impostor(link: FrameSocket) -> None:
        link.send(Kind.HELLO, {"nonce": b"a" * 32})
        _, answer = link.receive()
        for proof in (answer["proof"], b"", hmac.digest(OTHER, b"ranks", "sha256")):
            with contextlib.suppress(BusError):
                link.send(Kind.WELCOME, {"proof": proof, "welcome": {}})

    _, driver = meet(impostor, lambda link: enter(link, TOKEN, "s"))
    assert isinstance(driver, BusError)
    assert "does not have the token" in str(driver)


def test_an_answer_that_was_heard_before_is_refused() -> None:
    heard: list[Any] = []

    def listening(link: FrameSocket) -> None:
        """Let a true driver answer a true server, and keep what it said."""
        link.send(Kind.HELLO, {"nonce": b"a" * 32})
        heard.append(link.receive()[1])
        link.close()

    meet(listening, lambda link: enter(link, TOKEN, "s"))

    def replay(link: FrameSocket) -> Any:
        link.receive()
        link.send(Kind.HELLO, heard[0])
        return link.receive()

    server, driver = meet(lambda link: admit(link, TOKEN, lambda session: WELCOME), replay)
    assert isinstance(server, BusError)
    assert driver[0] is Kind.REFUSED


def test_the_session_is_part_of_the_proof() -> None:
    def driver(link: FrameSocket) -> Any:
        theirs = link.receive()[1]["nonce"]
        proof = hmac.digest(TOKEN, b"driver" + b"mine" + theirs + b"b" * 32, "sha256")
        link.send(Kind.HELLO, {"nonce": b"b" * 32, "session": "yours", "proof": proof})
        return link.receive()

    server, _ = meet(lambda link: admit(link, TOKEN, lambda session: WELCOME), driver)
    assert isinstance(server, BusError)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        b"x",
        {},
        {"nonce": b"b", "proof": "text"},
        {"nonce": 3, "proof": b"x"},
        {"nonce": b"b" * 32, "proof": b""},
        {"nonce": b"b" * 32, "proof": b"x" * 32, "session": ["a"] * 100},
    ],
)
@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.COMMAND, Kind.WELCOME])
def test_a_malformed_answer_is_a_bus_error(kind: Kind, answer: Any) -> None:
    def driver(link: FrameSocket) -> None:
        link.receive()
        link.send(kind, answer)

    server, _ = meet(lambda link: admit(link, TOKEN, lambda session: WELCOME), driver)
    assert isinstance(server, BusError)


@pytest.mark.parametrize("hello", [None, {}, {"nonce": 1}, {"nonce": "text"}, 5])
def test_a_malformed_greeting_is_a_bus_error(hello: Any) -> None:
    _, driver = meet(
        lambda link: link.send(Kind.HELLO, hello), lambda link: enter(link, TOKEN, "s")
    )
    assert isinstance(driver, BusError)


@pytest.mark.parametrize("said", [{"reason": "x"}, {}, None, [1], "text"])
@pytest.mark.parametrize("kind", [Kind.REFUSED, Kind.WELCOME])
def test_whatever_is_said_in_place_of_a_welcome_is_a_bus_error(kind: Kind, said: Any) -> None:
    def server(link: FrameSocket) -> None:
        link.send(Kind.HELLO, {"nonce": b"a" * 32})
        link.receive()
        link.send(kind, said)

    _, driver = meet(server, lambda link: enter(link, TOKEN, "s"))
    assert isinstance(driver, BusError)


def test_a_welcome_of_another_version_is_a_bus_error() -> None:
    def server(link: FrameSocket) -> None:
        ours = b"a" * 32
        link.send(Kind.HELLO, {"nonce": ours})
        theirs = link.receive()[1]["nonce"]
        proof = hmac.digest(TOKEN, b"ranks" + theirs + ours, "sha256")
        link.send(Kind.WELCOME, {"proof": proof, "welcome": {"epoch": "e", "colour": "red"}})

    _, driver = meet(server, lambda link: enter(link, TOKEN, "s"))
    assert isinstance(driver, BusError)


def test_a_stranger_cannot_send_much() -> None:
    def driver(link: FrameSocket) -> Any:
        link.receive()
        link.send_encoded(Kind.HELLO, encode(b"x" * HANDSHAKE_BYTES))

    server, _ = meet(lambda link: admit(link, TOKEN, lambda session: WELCOME), driver)
    assert isinstance(server, BusError)
    assert f"at most {HANDSHAKE_BYTES} bytes" in str(server)
