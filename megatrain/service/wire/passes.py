"""forward_backward and forward: bodies, protobuf or JSON, as PassRequests; PassResults as such."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from megatrain.config.service import Limits
from megatrain.errors import DataError
from megatrain.service.wire import tinker_wire_pb2 as wire
from megatrain.service.wire.scan import check_fields
from megatrain.service.wire.tensors import (
    Room,
    array_of_bytes,
    array_of_numbers,
    tensor_of_json,
    tensor_of_proto,
)
from megatrain.service.wire.types import Array, Datum, FloatArray, IntArray, PassRequest, PassResult

_FIELDS_OF_A_DATUM = 64  # chunks, inputs and spans, on average
_MAX_NAME = 128
TEXT_ALONE = "this model reads text alone"


def decode_pass(body: bytes, limits: Limits) -> PassRequest:
    """Return what a protobuf body asks for, with dense arrays.

    Its numbers are not checked yet: see check_pass.  Raises DataError for all that is malformed.
    """
    check_fields(body, limits.max_data * _FIELDS_OF_A_DATUM)
    try:
        message = wire.ForwardBackwardRequest.FromString(body)
    except (DecodeError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise DataError("the body is not the protobuf message that it should be") from error
    _check_count(len(message.data), limits)
    room = _room(limits)
    return PassRequest(
        model_id=message.model_id,
        seq_id=message.seq_id,
        data=[_datum_of_proto(index, datum, room) for index, datum in enumerate(message.data)],
        loss_fn=message.loss_fn,
        loss_config=_config_of_proto(message),
        forward_only=message.forward_only,
    )


def json_to_pass(value: Any, limits: Limits, *, forward_only: bool = False) -> PassRequest:
    """Return what a parsed JSON body asks for: of forward_backward, or of forward.

    Raises DataError.
    """
    if not isinstance(value, dict):
        raise DataError("the body must be a JSON object")
    given = value.get("forward_input" if forward_only else "forward_backward_input")
    if not isinstance(given, dict) or not isinstance(given.get("data"), list):
        raise DataError("the body must hold data, and the loss_fn, of a forward_backward_input")
    _check_count(len(given["data"]), limits)
    seq_id = value.get("seq_id")
    if type(seq_id) is not int or not 0 < seq_id < 1 << 31:
        raise DataError("seq_id must be a number from 1 to 2147483647")
    room = _room(limits)
    return PassRequest(
        model_id=_text("model_id", value.get("model_id")),
        seq_id=seq_id,
        data=[_datum_of_json(index, datum, room) for index, datum in enumerate(given["data"])],
        loss_fn=_text("loss_fn", given.get("loss_fn")),
        loss_config=_config_of_json(given.get("loss_fn_config")),
        forward_only=forward_only,
    )


def _room(limits: Limits) -> Room:
    # As many numbers as a dense body could hold in float32: sparse ones get no further.
    return Room(limits.max_body_bytes // 4)


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_data:
        raise DataError(
            f"{count} data in one request are too many: at most {limits.max_data}",
            hint="send them in several requests; gradients add up until optim_step",
        )


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be text")
    return value


def _datum_of_proto(index: int, datum: wire.Datum, room: Room) -> Datum:
    chunks = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise not_text(f"datum {index}", kind or "an empty chunk")
        tokens = chunk.encoded_text.tokens
        chunks.append(array_of_bytes(f"the input of datum {index}", tokens, wire.DTYPE_INT32))
    inputs: dict[str, Array] = {}
    for name, tensor in datum.loss_fn_inputs.items():
        inputs[name] = tensor_of_proto(_named(name, index), tensor, room)
    return Datum(_joined(chunks), inputs)


def _datum_of_json(index: int, datum: Any, room: Room) -> Datum:
    if not isinstance(datum, dict) or not isinstance(datum.get("loss_fn_inputs", {}), dict):
        raise DataError(f"datum {index} must have a model_input and loss_fn_inputs")
    inputs = {
        name: tensor_of_json(_named(name, index), tensor, room)
        for name, tensor in datum.get("loss_fn_inputs", {}).items()
    }
    return Datum(tokens_of_json(f"datum {index}", datum.get("model_input")), inputs)


def tokens_of_json(what: str, model_input: Any) -> IntArray:
    """Return the tokens of a model input, {"chunks": [...]}.  Raises DataError."""
    chunks = model_input.get("chunks") if isinstance(model_input, dict) else None
    if not isinstance(chunks, list) or not all(isinstance(each, dict) for each in chunks):
        raise DataError(f'the input of {what} must be {{"chunks": [...]}}')
    for chunk in chunks:
        # Clients before 0.3 left the type out of texts.
        if chunk.get("type", "encoded_text") != "encoded_text":
            raise not_text(what, str(chunk["type"])[:40])
    return _joined(
        array_of_numbers(f"the input of {what}", chunk.get("tokens"), np.int64) for chunk in chunks
    )


def not_text(what: str, kind: str) -> DataError:
    """Return the error for an input that is an image, audio or an asset."""
    return DataError(
        f"{TEXT_ALONE}, and {what} holds a chunk of another kind: {kind}",
        hint="send chunks of the type encoded_text",
    )


def _joined(chunks: Iterable[Array]) -> IntArray:
    result: IntArray = np.concatenate([np.zeros(0, np.int64), *chunks], dtype=np.int64)
    return result


def _named(name: str, index: int) -> str:
    if len(name) > _MAX_NAME:
        raise DataError(f"datum {index} has an input with a name of {len(name)} characters")
    return f"{name} of datum {index}"


def _config_of_proto(message: wire.ForwardBackwardRequest) -> Mapping[str, float | str]:
    config: dict[str, float | str] = dict(message.loss_fn_config)
    if message.loss_fn_config_v2:
        config = {}
        for name, value in message.loss_fn_config_v2.items():
            kind = value.WhichOneof("value")
            if kind is None:
                raise DataError(f"loss_fn_config has no value for {name[:_MAX_NAME]!r}")
            config[name] = value.number if kind == "number" else value.text
    return config


def _config_of_json(value: Any) -> Mapping[str, float | str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(
        type(each) in (int, float, str) for each in value.values()
    ):
        raise DataError("loss_fn_config must be an object of numbers and texts")
    try:
        return {name: v if isinstance(v, str) else float(v) for name, v in value.items()}
    except OverflowError as error:
        raise DataError("loss_fn_config has a number without room in float64") from error


def encode_pass_result(result: PassResult) -> bytes:
    """Return a ForwardBackwardOutput."""
    message = wire.ForwardBackwardOutput(
        loss_fn_output_type=result.output_type,
        loss_fn_outputs=_records(result),
        metrics=result.metrics,
    )
    return bytes(message.SerializeToString())


def _records(result: PassResult) -> Iterator[wire.ArrayRecord]:
    # What a record holds differs in its first dimension alone.
    for _, outputs in groupby(result.outputs, key=_layout):
        group = list(outputs)
        record = wire.ArrayRecord(type_tag=result.output_type, num_datums=len(group))
        for name in group[0]:
            record.fields[name].CopyFrom(_batched([output[name] for output in group]))
        yield record


def _layout(output: Mapping[str, FloatArray]) -> list[tuple[str, tuple[int, ...]]]:
    return sorted((name, array.shape[1:]) for name, array in output.items())


def _batched(arrays: Sequence[FloatArray]) -> wire.BatchedTensor:
    data = [np.ascontiguousarray(array, dtype="<f4").tobytes() for array in arrays]
    offsets = np.cumsum([0, *map(len, data)], dtype="<i8")
    return wire.BatchedTensor(
        data=b"".join(data),
        offsets=offsets.tobytes(),
        dtype=wire.DTYPE_FLOAT32,
        trailing_shape=arrays[0].shape[1:],
    )
