"""Messages between this process and an engine of ours: a length, then msgpack.  No pickle."""

import asyncio
import struct
from typing import Any

import msgpack

from megatrain.errors import SamplerError

MAX_BYTES = 256 << 20
"""Of one message."""
TOKEN_VARIABLE = "MEGATRAIN_SAMPLER_TOKEN"
"""Environment variable with the secret that each connection must begin with."""
_LENGTH = struct.Struct(">I")


def pack(message: dict[str, Any]) -> bytes:
    """Return a message with its length.  Raises SamplerError for one that is too large."""
    body: bytes = msgpack.packb(message)
    if len(body) > MAX_BYTES:
        raise SamplerError(
            f"a message to or from the sampler has at most {MAX_BYTES} bytes: this one has "
            f"{len(body)}",
            hint="ask for fewer samples, positions or most likely tokens at once",
        )
    return _LENGTH.pack(len(body)) + body


async def read(reader: asyncio.StreamReader) -> dict[str, Any]:
    """Read one message.  Raises SamplerError for a malformed one, and at the end
    IncompleteReadError."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_BYTES:
        raise SamplerError(f"a message has at most {MAX_BYTES} bytes, not {length}")
    body = await reader.readexactly(length)
    try:
        message = msgpack.unpackb(body, strict_map_key=False)
    except ValueError as error:
        raise SamplerError(f"a message of the sampler is malformed: {error}") from error
    if not isinstance(message, dict):
        raise SamplerError("a message of the sampler is no map")
    return message
