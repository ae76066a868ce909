"""Reads what a client sent: bytes under a cap, also while they are decompressed, and JSON.

A body is refused before it is held: a cap stands for the raw bytes, and one for the bytes that they
unpack to, which are counted while they are unpacked.
"""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Protocol

import zstandard
from pydantic import BaseModel, ValidationError

from megatrain.errors import DataError

MAX_JSON_BYTES = 32 << 20
"""A JSON body takes up to twenty times its size when it is parsed, so its cap is lower."""

_PIECE = 1 << 20
_ZSTD_PIECE = 256  # a block of 4 bytes unpacks to 128 KiB: 8 MiB at a time
_ZSTD_WINDOW = 1 << 24
_SMALL = 1 << 16


class BodyError(DataError):
    """A body that is not read; `status` is the HTTP status that says so: 400, 413, 415 or 422."""

    def __init__(self, message: str, *, status: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the status when the error travels between processes."""
        return _rebuild, (self.message, self.status, self.hint)


def _rebuild(message: str, status: int, hint: str | None) -> BodyError:
    return BodyError(message, status=status, hint=hint)


class Incoming(Protocol):
    """What is asked of a request: Starlette's has it."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers, looked up in any case."""

    def stream(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""


async def read_body(request: Incoming, max_bytes: int) -> bytes:
    """Return a request's body, decompressed.

    Raises BodyError: 413 for more than max_bytes, raw or decompressed; 415 for an encoding other
    than zstd and gzip; 400 for one that is damaged or cut off.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "zstd", "gzip", "x-gzip"):
        raise BodyError(
            f"Content-Encoding {encoding[:40]!r} is not known",
            status=415,
            hint="send zstd, gzip, or the body as it is",
        )
    raw = await _read_raw(request, max_bytes)
    if encoding in ("", "identity"):
        return raw
    if len(raw) < _SMALL:
        return decompress(raw, encoding, max_bytes)
    return await asyncio.to_thread(decompress, raw, encoding, max_bytes)


async def _read_raw(request: Incoming, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > max_bytes):
        raise _too_large(max_bytes)
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes)
        pieces.append(piece)
    return b"".join(pieces)


def decompress(raw: bytes, encoding: str, max_bytes: int) -> bytes:
    """Return what zstd or gzip bytes unpack to, at most max_bytes.  Raises BodyError."""
    unpack = _unpack_zstd if encoding == "zstd" else _unpack_gzip
    result = bytearray()
    try:
        for piece in unpack(raw):
            if len(result) + len(piece) > max_bytes:
                raise _too_large(max_bytes)
            result += piece
    except (zstandard.ZstdError, zlib.error, MemoryError) as error:
        raise BodyError(f"the body is not what {encoding} makes: {error}", status=400) from error
    return bytes(result)


def _unpack_zstd(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(raw):  # frames may follow each other
        unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
        while not unpacker.eof:
            if at >= len(raw):
                raise BodyError("the zstd body is cut off", status=400)
            yield unpacker.decompress(raw[at : at + _ZSTD_PIECE])
            at = min(at + _ZSTD_PIECE, len(raw)) - len(unpacker.unused_data)


def _unpack_gzip(raw: bytes) -> Iterator[bytes]:
    while raw:  # members may follow each other
        unpacker = zlib.decompressobj(wbits=31)
        while not unpacker.eof:
            piece = unpacker.decompress(raw, _PIECE)
            raw = unpacker.unconsumed_tail
            if not piece and not raw and not unpacker.eof:
                raise BodyError("the gzip body is cut off", status=400)
            yield piece
        raw = unpacker.unused_data


def parse_json(body: bytes) -> Any:
    """Return what a JSON body says.  Raises BodyError (400, 413)."""
    if len(body) > MAX_JSON_BYTES:
        raise _too_large(MAX_JSON_BYTES)
    try:
        return json.loads(body)
    except RecursionError:
        raise BodyError("the JSON body is nested too deeply", status=400) from None
    except ValueError as error:  # also of text that is not UTF-8, and of numbers without end
        raise BodyError(f"the body is not JSON: {error}", status=400) from None


def parse_model[M: BaseModel](model: type[M], body: bytes) -> M:
    """Return a JSON body as a model.  Raises BodyError: 422 says which fields are wrong."""
    value = parse_json(body)
    try:
        return model.model_validate(value)
    except ValidationError as error:  # its own text would repeat what was sent
        found = error.errors(include_url=False, include_input=False, include_context=False)
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in found[:5])
        raise BodyError(f"the body does not fit: {said[:1000]}", status=422) from None


def _too_large(max_bytes: int) -> BodyError:
    return BodyError(
        f"the body has more than {max_bytes} bytes",
        status=413,
        hint="send fewer data in a request",
    )
