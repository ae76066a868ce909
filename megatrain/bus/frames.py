"""Messages on a socket: a header that says how much comes, caps, no trust.  No torch.

frame  magic "MTRB" | u16 version | u8 kind | u8 zero | u64 bytes of the body | body (codec.py)
"""

import contextlib
import enum
import socket
import struct
import threading
import time
from typing import Any

from megatrain.bus.codec import decode, encode
from megatrain.errors import BusError

VERSION = 1
"""Of the protocol: both ends must speak the same."""
_MAGIC = b"MTRB"
_HEADER = struct.Struct("<4sHBBQ")
HANDSHAKE_BYTES = 1 << 16
"""Cap of a frame before its sender has proved who it is."""


class Kind(enum.IntEnum):
    """What a frame is."""

    HELLO = 1
    """Server to driver: a nonce.  Driver to server: its answer."""
    WELCOME = 2
    """Server to driver: who the ranks are, and what they have done."""
    REFUSED = 3
    """Server to driver, before it closes: why."""
    COMMAND = 4
    CANCEL = 5
    """Driver to server: a command's number.  Server to driver: whether that was in time."""
    REPLY = 6
    HEALTH = 7
    """Server to driver, about once a second."""
    LOST = 8
    """Server to driver: a rank is dead or stuck, and the ranks end."""


class FrameSocket:
    """A connected socket that speaks frames.  One thread reads; any thread may send."""

    def __init__(self, connection: socket.socket, max_bytes: int) -> None:
        self._socket, self.max_bytes = connection, max_bytes
        self._until: float | None = None
        self._sending = threading.Lock()
        self.heard_at = time.monotonic()
        """When anything came last, be it a part of a frame."""

    def send(self, kind: Kind, value: Any) -> None:
        """Send one frame.  Raises BusError if the other end is gone or the frame is too large."""
        self.send_encoded(kind, encode(value))

    def send_encoded(self, kind: Kind, body: bytes) -> None:
        """Send one frame of a value that is encoded already."""
        if len(body) > self.max_bytes:
            raise BusError(
                f"a message must have at most {self.max_bytes} bytes: {len(body)}",
                hint="send smaller batches, or raise max_message_bytes on both ends",
            )
        header = _HEADER.pack(_MAGIC, VERSION, kind, 0, len(body))
        try:
            with self._sending:
                self._socket.sendall(header + body if len(body) < 1 << 16 else header)
                if len(body) >= 1 << 16:
                    self._socket.sendall(body)
        except OSError as error:
            raise BusError(f"the connection was lost: {error}") from error

    def receive(self) -> tuple[Kind, Any]:
        """Return the next frame.  Raises BusError for a malformed one, or if the other end left."""
        kind, body = self.receive_encoded()
        return kind, decode(body)

    def receive_encoded(self) -> tuple[Kind, memoryview]:
        """Return the next frame, its body as it is."""
        magic, version, kind, zero, size = _HEADER.unpack(self._read(_HEADER.size))
        if magic != _MAGIC or zero:
            raise BusError("what came is no frame of this protocol")
        if version != VERSION:
            raise BusError(
                f"the other end speaks version {version} of the protocol, this one {VERSION}",
                hint="install the same megatrain on both ends",
            )
        if size > self.max_bytes:
            raise BusError(f"a message must have at most {self.max_bytes} bytes: {size}")
        try:
            return Kind(kind), self._read(size)
        except ValueError as error:
            raise BusError(f"unknown kind of frame: {kind}") from error

    def _read(self, size: int) -> memoryview:
        data = memoryview(bytearray(size))
        place = 0
        while place < size:
            try:
                if self._until is not None:
                    self._socket.settimeout(self._left(self._until))
                count = self._socket.recv_into(data[place:])
            except OSError as error:
                raise BusError(f"the connection was lost: {error}") from error
            if not count:
                raise BusError("the other end closed the connection")
            place += count
            self.heard_at = time.monotonic()
        return data

    @staticmethod
    def _left(until: float) -> float:
        if (left := until - time.monotonic()) <= 0:
            raise TimeoutError("the other end is too slow")
        return left

    def limit(self, seconds: float | None) -> None:
        """Bound all reading from now on, however slowly it comes; None ends that."""
        self._until = None if seconds is None else time.monotonic() + seconds
        try:
            self._socket.settimeout(seconds)
        except OSError as error:  # it was closed meanwhile
            raise BusError(f"the connection was lost: {error}") from error

    def close(self) -> None:
        """Close the connection; a thread that reads it gets BusError."""
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
