"""Bodies under a cap, also while they are decompressed."""

import asyncio
import gzip
import json
import tracemalloc
from collections.abc import AsyncIterator
from typing import ClassVar

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.requests import Request

from megatrain.service.wire.bodies import BodyError, decompress, parse_json, parse_model, read_body

CAP = 1 << 20


def _request(pieces: list[bytes], **headers: str) -> Request:
    waiting = list(pieces)

    async def receive() -> dict:
        body = waiting.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(waiting)}

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


def _read(pieces: list[bytes], **headers: str) -> bytes:
    return asyncio.run(read_body(_request(pieces, **headers), CAP))


def _refusal(pieces: list[bytes], **headers: str) -> BodyError:
    with pytest.raises(BodyError) as caught:
        _read(pieces, **headers)
    return caught.value


@pytest.mark.parametrize("size", [0, 1, 1000, 200_000, CAP])
def test_bodies_arrive_as_they_were_sent(size):
    body = (b"token" * (size // 5 + 1))[:size]
    assert _read([body[: size // 2], body[size // 2 :]]) == body
    assert _read([zstandard.compress(body)], content_encoding="zstd") == body
    assert _read([gzip.compress(body)], content_encoding="gzip") == body


@given(st.lists(st.binary(max_size=5000), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_frames_that_follow_each_other_are_one_body(parts):
    whole = b"".join(parts)
    assert decompress(b"".join(map(zstandard.compress, parts)), "zstd", CAP) == whole
    assert decompress(b"".join(map(gzip.compress, parts)), "gzip", CAP) == whole


def test_a_body_over_the_cap_is_refused_before_it_is_read():
    assert _refusal([], content_length=str(CAP + 1)).status == 413
    assert _refusal([], content_length="9" * 40).status == 413


def test_a_body_that_grows_over_the_cap_is_refused_while_it_is_read():
    pieces = [b"x" * (CAP // 2)] * 3 + [b"never read"]
    request = _request(pieces)
    with pytest.raises(BodyError) as caught:
        asyncio.run(read_body(request, CAP))
    assert caught.value.status == 413


@pytest.mark.parametrize("encoding", ["zstd", "gzip"])
def test_a_bomb_is_stopped_while_it_is_decompressed(encoding):
    zeros = bytes(256 << 20)
    bomb = zstandard.compress(zeros) if encoding == "zstd" else gzip.compress(zeros, 1)
    del zeros
    assert len(bomb) < 2 << 20
    tracemalloc.start()
    try:
        with pytest.raises(BodyError) as caught:
            decompress(bomb, encoding, CAP)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.status == 413
    assert most < 48 << 20


@pytest.mark.parametrize("encoding", ["zstd", "gzip"])
def test_a_body_that_is_cut_off_is_refused(encoding):
    whole = bytes(range(256)) * 300
    sent = zstandard.compress(whole) if encoding == "zstd" else gzip.compress(whole)
    for size in (1, len(sent) // 2, len(sent) - 1):
        assert _refusal([sent[:size]], content_encoding=encoding).status == 400


@pytest.mark.parametrize("encoding", ["zstd", "gzip"])
@given(noise=st.binary(min_size=1, max_size=2000))
@settings(deadline=None, max_examples=50)
def test_noise_is_refused(encoding, noise):
    with pytest.raises(BodyError) as caught:
        decompress(noise, encoding, CAP)
    assert caught.value.status in (400, 413)


def test_a_zstd_window_that_takes_much_memory_is_refused():
    options = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=options)
    unpacker = compressor.compressobj()  # of unknown size, so that the window is not narrowed
    sent = unpacker.compress(b"x" * 1000) + unpacker.flush()
    assert _refusal([sent], content_encoding="zstd").status == 400


def test_other_encodings_are_refused_by_name():
    error = _refusal([b""], content_encoding="br")
    assert error.status == 415
    assert "'br'" in str(error)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b"1" * 5000, b'{"a": nope}']
)
def test_what_is_not_json_is_refused(body):
    with pytest.raises(BodyError) as caught:
        parse_json(body)
    assert caught.value.status == 400


class _Model(BaseModel):
    number: int


def test_a_model_says_which_field_is_wrong_and_does_not_repeat_it():
    assert parse_model(_Model, b'{"number": 3}').number == 3
    with pytest.raises(BodyError, match="number: Input should be") as caught:
        parse_model(_Model, json.dumps({"number": "tml-secret"}).encode())
    assert caught.value.status == 422
    assert "secret" not in str(caught.value)


def test_a_request_without_a_body_is_an_empty_one():
    class Nothing:
        headers: ClassVar[dict[str, str]] = {}

        async def stream(self) -> AsyncIterator[bytes]:
            for _ in ():
                yield b""

    assert asyncio.run(read_body(Nothing(), CAP)) == b""
