"""Passes on the wire, against the client's own encoders and decoders."""

import json

import numpy as np
import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker.proto import tinker_public_pb2 as theirs
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest
from tinker.types.provenance_spans import PromptProvenanceSpan, SampledProvenanceSpan

from megatrain.config.service import Limits
from megatrain.errors import DataError
from megatrain.service.wire import tinker_wire_pb2 as ours
from megatrain.service.wire.passes import (
    decode_pass,
    encode_pass_result,
    json_to_pass,
)
from megatrain.service.wire.types import PassResult

LIMITS = Limits()


def _datum(tokens, **inputs):
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def _encoded(data, loss_fn="cross_entropy", config=None) -> bytes:
    request = ForwardBackwardRequest(ForwardBackwardInput(data, loss_fn, config), "run", 7)
    return forward_backward_request_to_proto(request).SerializeToString()


def test_every_field_has_the_client_s_number_type_and_label():
    def described(module):
        return {
            message.name: {
                field.number: (
                    field.name,
                    field.type,
                    field.is_repeated,
                    field.has_presence,
                    field.message_type and field.message_type.name,
                    field.containing_oneof and field.containing_oneof.name,
                )
                for field in message.fields
            }
            for message in module.DESCRIPTOR.message_types_by_name.values()
        } | {
            enum.name: {value.number: value.name for value in enum.values}
            for enum in module.DESCRIPTOR.enum_types_by_name.values()
        }

    mine, other = described(ours), described(theirs)
    assert mine == {name: other[name] for name in mine}
    # Of theirs, only what no request or reply holds is left out.
    assert other.keys() - mine.keys() == {"SamplingParams", "StopStrings", "StopTokens"}


_floats = st.floats(-1e6, 1e6, width=32)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 40), _floats), min_size=1),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None)
def test_dense_data_arrive_as_the_client_sent_them(rows):
    data = []
    for row in rows:
        tokens, targets, weights = zip(*row, strict=True)
        data.append(_datum(list(tokens), target_tokens=list(targets), weights=list(weights)))
    request = decode_pass(_encoded(data), LIMITS)
    assert (request.model_id, request.seq_id, request.loss_fn) == ("run", 7, "cross_entropy")
    assert not request.forward_only
    for row, datum in zip(rows, request.data, strict=True):
        tokens, targets, weights = zip(*row, strict=True)
        assert datum.tokens.tolist() == list(tokens)
        assert datum.inputs["target_tokens"].tolist() == list(targets)
        assert datum.inputs["weights"].tolist() == list(weights)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 1000))
@settings(deadline=None)
def test_sparse_tensors_are_what_they_are_densely(rows, columns, share, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < share
    weights = torch.where(kept, torch.randn(rows, columns, generator=generator), 0.0)
    targets = torch.where(kept, torch.randint(1, 99, (rows, columns), generator=generator), 0)
    datum = _datum([1] * rows, target_tokens=targets, weights=weights)
    (decoded,) = decode_pass(_encoded([datum]), LIMITS).data
    assert np.array_equal(decoded.inputs["target_tokens"], targets.numpy())
    assert np.array_equal(decoded.inputs["weights"], weights.numpy())
    wire = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1] * rows}]},
        "loss_fn_inputs": {
            name: {
                "data": tensor.data,
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "sparse_crow_indices": tensor.sparse_crow_indices,
                "sparse_col_indices": tensor.sparse_col_indices,
            }
            for name, tensor in datum.loss_fn_inputs.items()
        },
    }
    (parsed,) = json_to_pass(_body([json.loads(json.dumps(wire))]), LIMITS).data
    assert np.array_equal(parsed.inputs["weights"], weights.numpy())
    assert np.array_equal(parsed.inputs["target_tokens"], targets.numpy())


def _body(data, **more):
    given_input = {"data": data, "loss_fn": "ppo", "loss_fn_config": {"clip_low_threshold": 1}}
    return {"model_id": "run", "seq_id": 3, "forward_backward_input": given_input, **more}


def test_sparse_tensors_are_really_sent_sparse():
    datum = _datum([1] * 10, weights=torch.eye(10)[:, :3])
    message = theirs.ForwardBackwardRequest.FromString(_encoded([datum]))
    assert message.data[0].loss_fn_inputs["weights"].WhichOneof("encoding") == "sparse_csr"


def test_chunks_are_joined_and_spans_are_passed_over():
    chunks = [tinker.EncodedTextChunk(tokens=[1, 2]), tinker.EncodedTextChunk(tokens=[3])]
    datum = tinker.Datum(
        model_input=tinker.ModelInput(chunks=chunks), loss_fn_inputs={"target_tokens": [2, 3, 4]}
    ).with_provenance(
        [PromptProvenanceSpan(sequence_id="a", length=3)],
        [
            PromptProvenanceSpan(sequence_id="a", length=1),
            SampledProvenanceSpan(sequence_id="a", length=2),
        ],
    )
    body = _encoded([datum])
    assert ours.ForwardBackwardRequest.FromString(body).data[0].loss_fn_input_spans
    (decoded,) = decode_pass(body, LIMITS).data
    assert decoded.tokens.tolist() == [1, 2, 3]


def test_options_are_those_of_the_second_map_where_it_is_there():
    body = _encoded([_datum([1])], "ppo", {"clip_low_threshold": 0.5, "mode": "x"})
    assert decode_pass(body, LIMITS).loss_config == {"clip_low_threshold": 0.5, "mode": "x"}
    old = theirs.ForwardBackwardRequest.FromString(body)
    old.ClearField("loss_fn_config_v2")
    config = decode_pass(old.SerializeToString(), LIMITS).loss_config
    assert config == {"clip_low_threshold": 0.5}


def test_narrow_types_are_widened():
    message = ours.ForwardBackwardRequest(model_id="run", seq_id=1)
    inputs = message.data.add().loss_fn_inputs
    inputs["a"].dtype, inputs["a"].dense = ours.DTYPE_INT32, np.int32([1, -2]).tobytes()
    inputs["b"].dtype = ours.DTYPE_BFLOAT16
    inputs["b"].dense = (np.float32([1.5, -2]).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    (datum,) = decode_pass(message.SerializeToString(), LIMITS).data
    assert datum.inputs["a"].dtype == np.int64
    assert datum.inputs["a"].tolist() == [1, -2]
    assert datum.inputs["b"].dtype == np.float32
    assert datum.inputs["b"].tolist() == [1.5, -2]


def test_json_of_older_clients_is_read():
    datum = {
        "model_input": {"chunks": [{"tokens": [1, 2]}, {"type": "encoded_text", "tokens": [3]}]},
        "loss_fn_inputs": {"logprobs": {"data": [0, -1.5, 2], "dtype": "float32"}},
    }
    request = json_to_pass(_body([datum]), LIMITS)
    assert request.data[0].tokens.tolist() == [1, 2, 3]
    assert request.data[0].inputs["logprobs"].tolist() == [0, -1.5, 2]
    assert request.loss_config == {"clip_low_threshold": 1.0}
    body = {"model_id": "run", "seq_id": 3, "forward_input": {"data": [], "loss_fn": "ppo"}}
    assert json_to_pass(body, LIMITS, forward_only=True).forward_only


@pytest.mark.parametrize(
    "chunk",
    [
        tinker.types.ImageChunk(data=b"png", format="png", expected_tokens=2),
        tinker.types.DmelChunk(dmel=b"x"),
    ],
)
def test_images_and_audio_are_refused_by_name(chunk):
    datum = tinker.Datum(model_input=tinker.ModelInput(chunks=[chunk]), loss_fn_inputs={})
    with pytest.raises(DataError, match=r"this model reads text alone.*: (image|dmel)"):
        decode_pass(_encoded([datum]), LIMITS)


def test_asset_pointers_are_refused_by_name():
    datum = {"model_input": {"chunks": [{"type": "image_asset_pointer", "location": "x"}]}}
    with pytest.raises(DataError, match=r"text alone.*image_asset_pointer"):
        json_to_pass(_body([datum]), LIMITS)


@given(
    st.lists(
        st.one_of(
            st.lists(st.floats(width=32), max_size=5).map(np.float32),
            st.integers(1, 4).map(lambda k: np.arange(3 * k, dtype=np.float32).reshape(3, k)),
        ),
        max_size=6,
    )
)
@settings(deadline=None)
def test_results_arrive_as_they_are_ragged_or_wide(arrays):
    result = PassResult([{"logprobs": each} for each in arrays], {"loss:sum": 2.5, "n:mean": 1.0})
    read = deserialize_forward_backward_output(encode_pass_result(result))
    assert read.metrics == {"loss:sum": 2.5, "n:mean": 1.0}
    assert read.loss_fn_output_type == "ArrayRecord"
    for array, output in zip(arrays, read.loss_fn_outputs, strict=True):
        np.testing.assert_array_equal(output["logprobs"].to_numpy(), array)
