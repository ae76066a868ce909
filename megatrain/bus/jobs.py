"""A command on its way: what stands in front of it on the wire.  No torch."""

import struct
from dataclasses import dataclass

from megatrain.errors import BusError

_ENVELOPE = struct.Struct("<QQd?")
SEQ = struct.Struct("<Q")
"""In front of a reply, and all of a cancellation."""
CANCELLED = struct.Struct("<Q?")
"""The answer to a cancellation: the number, and whether it was in time."""


@dataclass(frozen=True, slots=True)
class Job:
    """A command as it travels from driver to ranks."""

    seq: int
    """Its number: they grow by the order of acceptance."""
    deadline_s: float
    payload: bytes | memoryview
    """The encoded command."""
    acknowledged: int = 0
    """All replies up to this number have come."""
    session: str = ""
    """Of the driver; not sent."""
    is_scattered: bool = False
    """Its rows follow, to those ranks that read them."""

    def pack(self) -> bytes:
        """Return it as bytes."""
        head = _ENVELOPE.pack(self.seq, self.acknowledged, self.deadline_s, self.is_scattered)
        return b"".join((head, self.payload))

    @classmethod
    def unpack(cls, data: memoryview, session: str = "") -> "Job | None":
        """Return what `pack` made bytes of; None of nothing.  Raises BusError."""
        if not len(data):
            return None
        if len(data) < _ENVELOPE.size:
            raise BusError(f"a command must have at least {_ENVELOPE.size} bytes: {len(data)}")
        seq, acknowledged, deadline_s, is_scattered = _ENVELOPE.unpack_from(data)
        payload = data[_ENVELOPE.size :]
        return cls(seq, deadline_s, payload, acknowledged, session, is_scattered)
