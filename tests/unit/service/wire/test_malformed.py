"""Passes that are damaged, or made to do harm: a DataError, in bounded time and memory."""

import resource
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config.service import Limits
from megatrain.errors import DataError
from megatrain.service.wire import tinker_wire_pb2 as wire
from megatrain.service.wire.bodies import BodyError, parse_json
from megatrain.service.wire.check import check_pass
from megatrain.service.wire.passes import decode_pass, json_to_pass

LIMITS = Limits()
SEEDS = 400


def _message() -> wire.ForwardBackwardRequest:
    message = wire.ForwardBackwardRequest(model_id="run", seq_id=1, loss_fn="cross_entropy")
    for _ in range(2):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.int32([1, 2, 3]).tobytes()
        targets = datum.loss_fn_inputs["target_tokens"]
        targets.dtype, targets.dense = wire.DTYPE_INT64, np.int64([2, 3, 4]).tobytes()
        weights = datum.loss_fn_inputs["weights"]
        weights.dtype = wire.DTYPE_FLOAT32
        weights.shape.extend([3])
        weights.dense = np.float32([0, 1, 1]).tobytes()
        sparse = datum.loss_fn_inputs["sparse"]
        sparse.dtype = wire.DTYPE_FLOAT32
        sparse.shape.extend([3, 4])
        sparse.sparse_csr.values = np.float32([1, 2]).tobytes()
        sparse.sparse_csr.crow_indices = np.int64([0, 1, 1, 2]).tobytes()
        sparse.sparse_csr.col_indices = np.int64([3, 0]).tobytes()
    message.loss_fn_config_v2["a"].number = 1.0
    return message


def _try(body: bytes) -> None:
    with suppress(DataError):
        request = decode_pass(body, LIMITS)
        check_pass(request, LIMITS, vocab_size=100, max_context_length=100)


@contextmanager
def _bounded(megabytes: int):
    """Fail for growth of the process beyond so much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes << 10


@given(st.binary(max_size=300))
def test_random_bytes_do_no_harm(body):
    _try(body)


def test_a_request_may_be_cut_anywhere():
    body = _message().SerializeToString()
    decode_pass(body, LIMITS)
    for size in range(len(body)):
        _try(body[:size])


def test_bytes_may_be_changed_anywhere():
    body = _message().SerializeToString()
    random = np.random.default_rng(0)
    with _bounded(200):
        for _ in range(SEEDS):
            damaged = bytearray(body)
            for _ in range(random.integers(1, 6)):
                damaged[random.integers(len(body))] = random.integers(256)
            _try(bytes(damaged))


@pytest.mark.parametrize(
    "shape", [[10**9], [10**9, 10**9], [-1], [-(10**9), -1], [1, 3, 1], [0], [1 << 62, 4], [2]]
)
def test_shapes_that_are_lies_are_refused(shape):
    for name in ("weights", "sparse"):
        message = _message()
        tensor = message.data[0].loss_fn_inputs[name]
        del tensor.shape[:]
        tensor.shape.extend(shape)
        with _bounded(50), pytest.raises(DataError):
            decode_pass(message.SerializeToString(), LIMITS)


def test_a_small_sparse_tensor_does_not_grow_without_bounds():
    message = _message()
    tensor = message.data[0].loss_fn_inputs["sparse"]
    for columns in (10**8, 10**15):
        tensor.shape[:] = [3, columns]
        with _bounded(50), pytest.raises(DataError, match="too large"):
            decode_pass(message.SerializeToString(), LIMITS)


def test_many_sparse_tensors_share_one_bound():
    message = _message()
    for index in range(40):
        tensor = message.data[0].loss_fn_inputs[f"sparse{index}"]
        tensor.CopyFrom(message.data[0].loss_fn_inputs["sparse"])
        tensor.shape[:] = [3, 10**6]
    with _bounded(250), pytest.raises(DataError, match="too large"):
        decode_pass(message.SerializeToString(), LIMITS)


@pytest.mark.parametrize(
    ("field", "values", "said"),
    [
        ("crow_indices", [0, 2, 1, 2], "do not rise"),
        ("crow_indices", [1, 1, 1, 2], "do not rise"),
        ("crow_indices", [0, 1, 1, 10**9], "do not rise"),
        ("crow_indices", [0, 2], "row pointers"),
        ("col_indices", [4, 0], "outside"),
        ("col_indices", [-1, 0], "outside"),
        ("col_indices", [0], "column indices"),
    ],
)
def test_indices_that_are_wrong_are_refused(field, values, said):
    message = _message()
    csr = message.data[0].loss_fn_inputs["sparse"].sparse_csr
    setattr(csr, field, np.int64(values).tobytes())
    with pytest.raises(DataError, match=said):
        decode_pass(message.SerializeToString(), LIMITS)


def test_cells_that_are_listed_twice_are_refused():
    message = _message()
    csr = message.data[0].loss_fn_inputs["sparse"].sparse_csr
    csr.crow_indices = np.int64([0, 2, 2, 2]).tobytes()
    csr.col_indices = np.int64([1, 1]).tobytes()
    with pytest.raises(DataError, match="within a row"):
        decode_pass(message.SerializeToString(), LIMITS)


@pytest.mark.parametrize("dtype", [0, 5, 99])
def test_types_that_are_unknown_are_refused(dtype):
    message = _message()
    message.data[0].loss_fn_inputs["weights"].dtype = dtype
    with pytest.raises(DataError, match="dtype"):
        decode_pass(message.SerializeToString(), LIMITS)


def test_bytes_that_are_no_whole_numbers_are_refused():
    message = _message()
    message.data[0].model_input[0].encoded_text.tokens = b"\0" * 7
    with pytest.raises(DataError, match="not a multiple of 4"):
        decode_pass(message.SerializeToString(), LIMITS)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x1a\x00" * (8 << 20),  # data without anything
        b"\x1a\x80\x80\x80\x08" + b"\x0a\x00" * (8 << 20),  # chunks without anything
        b"\x3a\x00" * (8 << 20),  # options without anything
    ],
    ids=["data", "chunks", "options"],
)
def test_messages_that_are_larger_parsed_than_sent_are_not_parsed(bomb):
    with _bounded(100), pytest.raises(DataError, match="parts"):
        decode_pass(bomb, LIMITS)


def test_deep_nesting_is_refused():
    deep = b""
    for _ in range(20_000):
        deep = b"\x1b" + deep + b"\x1c"  # groups within groups
    with pytest.raises(DataError):
        decode_pass(deep, LIMITS)
    length = b""
    for _ in range(300):
        length = bytes([0x0A, *_varint(len(length))]) + length
    _try(bytes([0x1A, *_varint(len(length))]) + length)


def _varint(value: int) -> bytes:
    result = []
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["data", "dtype", "shape", "chunks", "tokens", "type", "x"]), inner
        )
    ),
    max_leaves=12,
)


@given(_json, st.sampled_from(["body", "input", "datum", "model_input", "tensor", "config"]))
@settings(deadline=None, max_examples=300)
def test_json_of_any_shape_does_no_harm(noise, where):
    datum = {"model_input": {"chunks": [{"tokens": [1]}]}, "loss_fn_inputs": {}}
    given_input = {"data": [datum], "loss_fn": "cross_entropy"}
    body = {"model_id": "run", "seq_id": 1, "forward_backward_input": given_input}
    if where == "body":
        body = noise
    elif where == "input":
        body["forward_backward_input"] = noise
    elif where == "datum":
        given_input["data"] = [noise]
    elif where == "model_input":
        datum["model_input"] = noise
    elif where == "tensor":
        datum["loss_fn_inputs"] = {"target_tokens": noise}
    else:
        given_input["loss_fn_config"] = noise
    with suppress(DataError):
        request = json_to_pass(body, LIMITS)
        check_pass(request, LIMITS, vocab_size=100, max_context_length=100)


@pytest.mark.parametrize("seq_id", [None, 0, -1, 1 << 31, "1", 1.0, True])
def test_json_needs_a_number_in_its_sequence(seq_id):
    given_input = {"data": [], "loss_fn": "ppo"}
    body = {"model_id": "run", "seq_id": seq_id, "forward_backward_input": given_input}
    with pytest.raises(DataError, match="seq_id"):
        json_to_pass(body, LIMITS)


def test_deep_json_is_refused():
    with pytest.raises(BodyError):
        parse_json(b'{"a":' * 100_000)


def test_too_many_data_are_refused_with_the_way_out():
    message = wire.ForwardBackwardRequest(model_id="run", seq_id=1)
    for _ in range(LIMITS.max_data + 1):
        message.data.add()
    with pytest.raises(DataError, match="several requests"):
        decode_pass(message.SerializeToString(), LIMITS)
