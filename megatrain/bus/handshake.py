"""Both ends prove that they have the token, without sending it.  No torch.

ranks -> driver   nonce a
driver -> ranks   nonce b, HMAC-SHA256(token, "driver" session a b), session
ranks -> driver   HMAC-SHA256(token, "ranks" b a), and who they are
"""

import hmac
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megatrain.bus.frames import HANDSHAKE_BYTES, FrameSocket, Kind
from megatrain.errors import BusError

WELCOME_BYTES = 1 << 20
"""Cap of what ranks say of themselves."""
HANDSHAKE_S = 10.0
"""Seconds that a stranger gets."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """What ranks say of themselves."""

    epoch: str
    """Another one whenever they have started anew, or for another session."""
    last_seq: int
    """Of the last command that they have accepted; 0 for none."""
    mesh: dict[str, int]
    hosts: list[str]
    """By rank."""
    pids: list[int]
    """By rank."""
    platform: str


def admit(link: FrameSocket, token: bytes, welcome: Callable[[str], Welcome]) -> str:
    """Let a driver in that knows the token, and return the name of its session.

    `welcome` says who the ranks are to that session, or raises BusError if it may not come in.
    Raises BusError, and says why to the other end, for either.
    """
    size, link.max_bytes = link.max_bytes, HANDSHAKE_BYTES
    ours = secrets.token_bytes(32)
    link.send(Kind.HELLO, {"nonce": ours})
    kind, answer = link.receive()
    theirs, proof = _field(answer, "nonce"), _field(answer, "proof")
    session = str(answer.get("session", ""))[:64]
    expected = _proof(token, b"driver" + session.encode(), ours, theirs)
    if kind is not Kind.HELLO or not hmac.compare_digest(proof, expected):
        refuse(link, "the token is another one than the ranks'")
        raise BusError("a driver with a wrong token was refused")
    proof = _proof(token, b"ranks", theirs, ours)
    link.max_bytes = size
    try:
        who = asdict(welcome(session))
    except BusError as error:
        refuse(link, error.message)
        raise
    link.send(Kind.WELCOME, {"proof": proof, "welcome": who})
    return session


def enter(link: FrameSocket, token: bytes, session: str) -> Welcome:
    """Be let in as the driver; return who the ranks are.

    `session` names the driver: to another one, ranks are as if they had just started.
    Raises BusError.
    """
    size, link.max_bytes = link.max_bytes, HANDSHAKE_BYTES
    kind, hello = link.receive()
    if kind is Kind.REFUSED:
        raise refusal(hello)
    theirs, ours = _field(hello, "nonce"), secrets.token_bytes(32)
    proof = _proof(token, b"driver" + session.encode(), theirs, ours)
    link.send(Kind.HELLO, {"nonce": ours, "session": session, "proof": proof})
    link.max_bytes = WELCOME_BYTES  # it may name thousands of ranks, but is not proved yet
    kind, answer = link.receive()
    link.max_bytes = size
    if kind is Kind.REFUSED:
        raise refusal(answer)
    if not hmac.compare_digest(_field(answer, "proof"), _proof(token, b"ranks", ours, theirs)):
        raise BusError("what listens there does not have the token")
    try:
        return Welcome(**answer["welcome"])
    except (KeyError, TypeError) as error:
        raise BusError(
            f"the ranks do not say who they are as this version does: {error}",
            hint="install the same megatrain on both ends",
        ) from error


def refuse(link: FrameSocket, reason: str) -> None:
    """Tell the other end why it is refused."""
    link.send(Kind.REFUSED, {"reason": reason})


def refusal(value: Any) -> BusError:
    """Return the error that a REFUSED frame stands for."""
    reason = value.get("reason") if isinstance(value, dict) else value
    return BusError(f"the ranks refused this driver: {reason}")


def _field(value: Any, name: str) -> bytes:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, bytes):
        raise BusError(f"a handshake must have {name}")
    return found


def _proof(token: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(token or b"none", role + first + second, "sha256")
