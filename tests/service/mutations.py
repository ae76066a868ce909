"""Bodies of the official client, damaged: bytes, fields of protobuf, values of JSON; and bombs."""

import copy
import gzip
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import zstandard
from tinker.proto import tinker_public_pb2 as theirs

from tests.service.owned import protobuf

BILLION = 10**9
INF, NAN = float("inf"), float("nan")
NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        [],
        {},
        "",
        "\0",
        "\ud800",
        "\u202e",
        "x" * 100_000,
        [[]],
        [None],
        {"": 1},
    ),
    *(-1, 0, 1, BILLION, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400),
    *(
        {"": 1},
        0.5,
        -0.0,
        1e-320,
        1e308,
        NAN,
        INF,
        -INF,
        "NaN",
        "1",
        "tinker://",
        "../../etc/passwd",
    ),
    *({"": 1}, [0] * 5000, ["x"] * 5000, {str(key): key for key in range(2000)}),
)
"""Values that no field likes."""
LARGEST = 100_000
"""Bytes from which on a message is not changed again: gigabytes have tests of their own."""
DEEP = b'{"a":' * 100_000
"""JSON that is nested as deep as a stack."""

Message = Any
"""A ForwardBackwardRequest of theirs."""


def mutated_json(draw: random.Random, body: Any) -> bytes:
    """Return a JSON body with some values put in, taken out, or replaced."""
    body = copy.deepcopy(body)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(body))
        holder, key = draw.choice(places)
        change = draw.random()
        if change < 0.1:
            del holder[key]
        elif change < 0.2 and isinstance(holder, list):
            holder += [holder[key]] * draw.choice([1, 100, 5000])
        elif change < 0.3 and isinstance(holder, dict):
            holder[draw.choice(["", "extra", "\0", "x" * 300])] = copy.deepcopy(draw.choice(NASTY))
        else:
            holder[key] = copy.deepcopy(draw.choice(NASTY))
        if not list(_places(body)):
            break
    return json.dumps(body).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key, each in list(value.items() if isinstance(value, dict) else enumerate(value)):
            if isinstance(key, int) and key > 20:
                return
            yield value, key
            yield from _places(each)


def mutated_bytes(draw: random.Random, body: bytes) -> bytes:
    """Return a body with bits flipped, cut off, doubled, or with lengths that lie."""
    data = bytearray(body)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data)) if data else 0
        change = draw.randrange(6)
        if change == 0 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif change == 1:
            del data[at:]
        elif change == 2:
            data[at:at] = draw.randbytes(draw.choice([1, 10, 1000]))
        elif change == 3:
            data[at : at + draw.choice([1, 8, 50])] = b""
        elif change == 4:
            data[at:at] = data[at : at + draw.choice([1, 8, 50])] * draw.choice([1, 50])
        else:
            data[at:at] = draw.choice(LENGTHS)
    return bytes(data)


LENGTHS = (
    b"\x1a\x80\x94\xeb\xdc\x03",  # data of 10^9 bytes
    b"\x1a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # of 2^63 - 1
    b"\xff" * 12,  # a number without end
    b"\x1a\x00" * 5000,  # data of nothing
    b"\x0b" * 200,  # groups in groups
)


def mutated_message(draw: random.Random, run: str, seq: int) -> bytes:
    """Return a forward_backward that is protobuf, and asks for what nobody can do."""
    message = theirs.ForwardBackwardRequest.FromString(protobuf(run, seq))
    for _ in range(draw.randint(1, 2)):
        draw.choice(MESSAGES)(draw, message)
        if message.ByteSize() > LARGEST:  # a second change may make it a thousand times larger
            break
    return bytes(message.SerializeToString())


def with_nan(body: bytes) -> bytes:
    """Return a forward_backward with weights that are no numbers."""
    message = theirs.ForwardBackwardRequest.FromString(body)
    weights = message.data[0].loss_fn_inputs["weights"]
    weights.dtype, weights.dense = 1, np.float32([NAN] * 3).tobytes()
    return bytes(message.SerializeToString())


def _tensor(draw: random.Random, message: Message) -> Any:
    inputs = message.data[0].loss_fn_inputs
    return inputs[draw.choice(["target_tokens", "weights", "logprobs", "advantages", "x" * 200])]


def _shape(draw: random.Random, message: Message) -> None:
    tensor = _tensor(draw, message)
    del tensor.shape[:]
    shapes = (
        [-1],
        [BILLION],
        [BILLION] * 2,
        [3, 0],
        [0],
        [2**62, 4],
        [1] * 200,
        [3, -3],
        [-(2**63)],
    )
    tensor.shape.extend(draw.choice(shapes))


def _dtype(draw: random.Random, message: Message) -> None:
    _tensor(draw, message).dtype = draw.choice([0, 1, 2, 3, 4, 99])


def _values(draw: random.Random, message: Message) -> None:
    tensor = _tensor(draw, message)
    values = draw.choice([NAN, INF, -INF, 3e38, -3e38, 1e-45, 0.0, -1.0])
    tensor.dtype, tensor.dense = 1, np.float32([values] * draw.choice([0, 1, 3, 1000])).tobytes()


def _targets(draw: random.Random, message: Message) -> None:
    tensor = message.data[0].loss_fn_inputs["target_tokens"]
    values = draw.choice([-1, -100, 2**31, 2**63 - 1, -(2**63), 511, 512])
    tensor.dense = np.int64([values] * draw.choice([3, 4, 6])).tobytes()


def _sparse(draw: random.Random, message: Message) -> None:
    tensor = _tensor(draw, message)
    rows = draw.choice([3, BILLION, 2**40, -1])
    del tensor.shape[:]
    tensor.shape.extend([rows, draw.choice([1, 3, BILLION, -1])])
    crow = draw.choice([[0, 1, 1, 2], [0, -1, 5, 2], [2, 1, 0, 0], [0] * 4, [BILLION] * 4])
    tensor.sparse_csr.values = np.float32([1, 2]).tobytes()
    tensor.sparse_csr.crow_indices = np.int64(crow).tobytes()
    tensor.sparse_csr.col_indices = np.int64(draw.choice([[0, 1], [BILLION, -1], [0, 0]])).tobytes()


def _tokens(draw: random.Random, message: Message) -> None:
    chunk = message.data[0].model_input[0].encoded_text
    tokens = draw.choice([[], [-1], [2**31 - 1] * 3, [5] * 2, [5] * 70_000, [511] * 3, [512] * 3])
    chunk.tokens = np.int32(tokens).tobytes() + draw.choice([b"", b"\0"])


def _chunks(draw: random.Random, message: Message) -> None:
    if draw.random() < 0.5:
        del message.data[0].model_input[:]
    else:
        message.data[0].model_input.extend([message.data[0].model_input[0]] * 2000)


def _data(draw: random.Random, message: Message) -> None:
    if draw.random() < 0.3:
        del message.data[1:]
        message.data[0].Clear()
    else:
        message.data.extend([message.data[0]] * draw.choice([10, 5000]))


def _loss(draw: random.Random, message: Message) -> None:
    names = ("", "x" * 1000, "ppo", "dro", "importance_sampling", "stable_reinforce", "../x", "\0")
    message.loss_fn = draw.choice(names)


def _config(draw: random.Random, message: Message) -> None:
    name = draw.choice(["clip_low_threshold", "clip_high_threshold", "beta", "", "x" * 1000])
    message.loss_fn_config[name] = draw.choice([NAN, INF, -1.0, 1e30, 1e-45])


def _number(draw: random.Random, message: Message) -> None:
    message.seq_id = draw.choice([-1, 0, 1, 2**31 - 1, -(2**31), message.seq_id + 1])


MESSAGES: tuple[Callable[[random.Random, Message], None], ...] = (
    *(_shape, _dtype, _values, _targets, _sparse, _tokens, _chunks, _data, _loss, _config, _number),
)


def bombs() -> Iterator[tuple[bytes, dict[str, str]]]:
    """Yield small bodies that unpack to gigabytes, or only say so."""
    zeros = bytes(1 << 20)
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    gigabytes = b"".join(packer.compress(zeros) for _ in range(1024)) + packer.flush()
    frames = zstandard.ZstdCompressor().compress(zeros) * 1024
    lying = bytearray(zstandard.ZstdCompressor().compress(zeros))
    lying[4:9] = b"\xe0" + (2**40).to_bytes(8, "little")[:4]
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=31)
    ).compress(zeros)
    for body in (gigabytes, frames, bytes(lying), wide, b"", b"\x28\xb5\x2f\xfd", frames[:1000]):
        yield body, {"content-encoding": "zstd"}
    yield zstandard.ZstdCompressor().compress(gigabytes), {"content-encoding": "zstd, zstd"}
    yield gzip.compress(zeros * 100), {"content-encoding": "gzip"}
    yield gzip.compress(zeros) * 200, {"content-encoding": "gzip"}
    yield b"x", {"content-encoding": "br"}
    yield b"x", {"content-encoding": "zstd" * 1000}
