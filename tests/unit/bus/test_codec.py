"""Values as bytes and back: what may travel arrives as it was, and bad bytes are BusError."""

import contextlib
import dataclasses
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from megatrain.bus.beat import Beat
from megatrain.bus.codec import RECORDS, Failure, RawTensor, decode, encode
from megatrain.bus.commands import COMMANDS, ForwardBackward, OpenModel, Ping, SetLoss
from megatrain.errors import BusError, ConfigError
from megatrain.types import AdapterBatch, StepOutput

DTYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"]

plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
)
numpy_arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays.arrays(
        np.dtype(dtype).newbyteorder("<"),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    )
)
raw_tensors = st.builds(
    RawTensor,
    st.sampled_from(["bfloat16", "float8_e4m3fn", "float32"]),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.binary(max_size=64),
)
failures = st.builds(
    Failure,
    kind=st.just("StateError"),
    message=st.text(st.characters(exclude_categories=["Cs"])),
    hint=st.none() | st.just("try again"),
    rank=st.none() | st.integers(0, 9999),
)
beats = st.builds(
    Beat, st.integers(0, 9999), st.just("host"), st.integers(1, 2**22), count=st.integers(0, 2**40)
)
leaves = plain | numpy_arrays | raw_tensors | failures | beats


def containers(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.integers(-9, 9)
    return (
        st.lists(parts, max_size=4)
        | st.lists(parts, max_size=4).map(tuple)
        | st.dictionaries(names, parts, max_size=4)
        | st.builds(lambda part: AdapterBatch("a", [part], {"x": part}), parts)
        | st.builds(lambda part: SetLoss(spec="Loss", options={"given": part}), parts)
    )


values = st.recursive(leaves, containers, max_leaves=20)


def same(left: Any, right: Any) -> bool:
    """Tell whether `right` is what should come of `left`: tuples become lists, NaN is itself."""
    if isinstance(left, RawTensor):
        return (left.dtype, left.shape, bytes(left.data)) == (
            right.dtype,
            right.shape,
            bytes(right.data),
        )
    if dataclasses.is_dataclass(left):
        fields = [field.name for field in dataclasses.fields(left)]
        return type(left) is type(right) and all(
            same(getattr(left, name), getattr(right, name)) for name in fields
        )
    if isinstance(left, np.ndarray):
        return (
            (left.dtype, left.shape) == (right.dtype, right.shape)
            and not right.flags.writeable
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, list | tuple):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    return type(left) is type(right) and left == right


@settings(deadline=None, max_examples=300)
@given(values)
@example([np.zeros((0, 3), "<f4"), np.zeros((), "<i8"), RawTensor("bfloat16", (), b"")])
def test_what_may_travel_arrives_as_it_was(value: Any) -> None:
    assert same(value, decode(encode(value)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_an_array_keeps_dtype_shape_and_bits(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    other = decode(encode({"array": array}))["array"]
    assert other.dtype == array.dtype
    assert np.array_equal(other, array)
    assert other.shape == shape


def test_an_array_of_any_layout_arrives_in_c_order() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    for each in (
        array.T,
        array[:, ::2],
        array[::-1],
        np.asfortranarray(array),
        array.astype(">i8"),
    ):
        assert np.array_equal(decode(encode(each)), each)


def test_torch_tensors_travel_as_arrays() -> None:
    import torch

    assert np.array_equal(decode(encode(torch.arange(4).reshape(2, 2))), [[0, 1], [2, 3]])
    with pytest.raises(ConfigError, match=r"inputs\[1\] cannot be sent"):
        encode({"inputs": [1, torch.ones(2, requires_grad=True)]})


def test_scalars_paths_and_mappings_become_plain() -> None:
    value = (np.float32(0.5), np.int64(-3), np.bool_(True), np.str_("x"), Path("/a/b"), ((1,), ()))
    assert decode(encode(value)) == [0.5, -3, True, "x", "/a/b", [[1], []]]
    assert decode(encode(OrderedDict(b=1, a=OrderedDict()))) == {"b": 1, "a": {}}
    assert decode(encode({3: bytearray(b"x"), "m": memoryview(b"y")})) == {3: b"x", "m": b"y"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_travels(name: str) -> None:
    kind = COMMANDS[name]
    needed = {
        field.name: "x"
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    command = kind(**needed)
    assert decode(encode(command)) == command


def test_an_output_travels() -> None:
    output = StepOutput(0.5, [np.ones(3, np.float32), np.zeros(0, np.float32)], statistics={"a": 1})
    assert same(output, decode(encode(output)))


class Stranger:
    """Of no kind that is known."""

    def __repr__(self) -> str:
        return "a stranger"


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, {"b": Stranger()}]}, r"a\[1\]\.b cannot be sent to ranks: a stranger"),
        (ForwardBackward(inputs=[{"input_ids": np.array([None])}]), r"inputs\[0\]\.input_ids"),
        (OpenModel(model_id="x", options={"dtype": np.dtype("f4")}), "options.dtype"),
        (SetLoss(spec=len, options={}), "spec"),
        ({"x": 2**64}, "x cannot"),
        ({"x": {1, 2}}, "x cannot"),
        ({"x": 1j}, "x cannot"),
        ({"x": np.complex64(1)}, "x cannot"),
        ({"x": np.longdouble(1)}, "x cannot"),
        ({"x": np.array(["text"])}, "x cannot"),
        ({"x": np.array(["2020"], "M8[Y]")}, "x cannot"),
        ({"x": "\ud800"}, "x cannot"),
        (Stranger(), "the value cannot"),
    ],
)
def test_what_cannot_travel_is_named_with_its_place(value: Any, place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        encode(value)


@pytest.mark.parametrize("start", [[], [1]])
def test_what_holds_itself_is_refused(start: list[Any]) -> None:
    start.append(start)
    mapping: dict[str, Any] = {}
    mapping["x"] = mapping
    for value in (start, {"inputs": start}, mapping, [mapping]):
        with pytest.raises(ConfigError, match="cannot be sent"):
            encode(value)


def test_records_that_are_too_deep_are_refused_where_they_are_made() -> None:
    value: Any = None
    for _ in range(100):
        value = AdapterBatch("a", [value])
    with pytest.raises(ConfigError, match="cannot be sent"):
        encode(value)


@pytest.mark.parametrize("key", [b"x", 0.5, None, True])
def test_a_key_arrives_as_it_was(key: Any) -> None:
    assert decode(encode({"options": {key: 1}})) == {"options": {key: 1}}


def test_a_key_that_becomes_a_list_is_refused_at_the_other_end() -> None:
    with pytest.raises(BusError, match="malformed"):
        decode(encode({(1, 2): 3}))


def test_a_class_of_the_same_name_is_no_record() -> None:
    other = dataclasses.make_dataclass("Ping", ["model"])
    with pytest.raises(ConfigError, match="cannot be sent"):
        encode(other("m"))


def message(head: Any, buffers: bytes = b"") -> bytes:
    packed = head if isinstance(head, bytes) else msgpack.packb(head)
    return struct.pack("<I", len(packed)) + packed + buffers


def extension(kind: int, value: Any) -> msgpack.ExtType:
    return msgpack.ExtType(kind, msgpack.packb(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        struct.pack("<I", 5) + b"\x01",
        struct.pack("<I", 2**32 - 1),
        message([1]) + b"more",
        message(b"\xc1"),
        message(b"\xdd\xff\xff\xff\xff"),
        message(b"\xdf\xff\xff\xff\xff"),
        message(b"\xdb\xff\xff\xff\xff"),
        message(b"\xa2\xff\xfe"),
        message({"a": extension(9, 1)}),
        message(extension(1, ["<f4", [2**40]])),
        message(extension(1, ["<f4", [2**63, 2**63]])),
        message(extension(1, ["<f4", [-1]]), b"1234"),
        message(extension(1, ["<f4", [True]]), b"1234"),
        message(extension(1, ["<f4", [1.0]]), b"1234"),
        message(extension(1, ["<f4", 1]), b"1234"),
        message(extension(1, ["|O", [1]]), b"12345678"),
        message(extension(1, ["<i4,<i4", [1]]), b"12345678"),
        message(extension(1, ["(2,)<i4", [1]]), b"12345678"),
        message(extension(1, ["<U1", [1]]), b"1234"),
        message(extension(1, ["<c8", [1]]), b"12345678"),
        message(extension(1, ["<M8[s]", [1]]), b"12345678"),
        message(extension(1, ["no type", [1]]), b"1234"),
        message(extension(1, [None, [1]]), b"12345678"),
        message(extension(1, ["<f4", [1] * 100]), b"1234"),
        message(extension(1, ["<f4", [2]]), b"1234"),
        message(extension(1, ["<f4"]), b"1234"),
        message(extension(2, ["bfloat16", [2], 5]), b"1234"),
        message(extension(2, ["bfloat16", [2], -1]), b"1234"),
        message(extension(2, ["bfloat16", "x", 4]), b"1234"),
        message(extension(2, [])),
        message(extension(3, ["Nobody", {}])),
        message(extension(3, ["__class__", {}])),
        message(extension(3, [["Ping"], {}])),
        message(extension(3, ["Ping", []])),
        message(extension(3, ["Ping", {"model": "m", "more": 1}])),
        message(extension(3, ["Ping", {1: 1, "more": 2}])),
        message(extension(3, ["Save", {}])),
        message(extension(3, ["Ping", {"model": "m"}]), b"1"),
        message(b"\x82\x90\x01\x01\x01"),
    ],
)
def test_bad_bytes_are_a_bus_error(data: bytes) -> None:
    with pytest.raises(BusError, match="malformed"):
        decode(data)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_value_or_a_bus_error(data: bytes) -> None:
    for each in (data, message(data), message(extension(1, 0))[:-1] + data):
        with contextlib.suppress(BusError):
            decode(each)


@settings(deadline=None, max_examples=150)
@given(values, st.data())
def test_cut_and_flipped_messages_are_a_value_or_a_bus_error(value: Any, data: Any) -> None:
    whole = encode(value)
    with pytest.raises(BusError):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(BusError):
        decode(bytes(flipped))


def test_a_small_message_does_not_make_much_memory() -> None:
    nested = b"".join(b"\xdd" + struct.pack(">I", 60_000) for _ in range(500))
    bombs = [
        message(nested.ljust(1 << 16, b"\xc0")),
        message(b"\xdc\xff\xff" * 400 + b"\xc0" * 4096),
        message(extension(1, ["<f4", [0, 2**62]])),
        message(extension(1, ["|b1", [2**31]])),
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            with contextlib.suppress(BusError):
                decode(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


@pytest.mark.parametrize("depth", [10, 100, 400, 5000])
def test_records_in_records_do_not_overflow_the_stack(depth: int) -> None:
    """In a process of its own: what fails here ends it."""
    code = f"""
import struct
from megatrain.bus.codec import decode
from megatrain.errors import BusError
head = b"\\xc0"
for _ in range({depth}):
    body = b"\\x92" + head + b"\\x80"
    head = b"\\xc9" + struct.pack(">I", len(body)) + b"\\x03" + body
try:
    decode(struct.pack("<I", len(head)) + head)
except BusError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def test_records_are_known_by_their_own_names() -> None:
    assert all(name == kind.__name__ for name, kind in RECORDS.items())
    assert decode(encode([Ping()])) == [Ping()]
