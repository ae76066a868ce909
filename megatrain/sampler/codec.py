"""Requests and results as plain maps for frames, and back."""

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.sampler.types import Piece, SampledSequence, SampleRequest, SampleResult, TopK

Map = dict[str, Any]
FIELDS = frozenset(field.name for field in fields(SampleRequest))


def pack_array(array: npt.NDArray[Any] | None) -> Map | None:
    """Return an array's type, shape and bytes."""
    if array is None:
        return None
    return {"t": array.dtype.str, "s": list(array.shape), "b": array.tobytes()}


def unpack_array(value: Map | None, dtype: type[np.generic]) -> Any:
    """Return the array, which must be of that type.  Raises ValueError."""
    if value is None:
        return None
    if np.dtype(value["t"]) != np.dtype(dtype):
        raise ValueError(f"an array of {np.dtype(dtype)} is expected, not {value['t']}")
    return np.frombuffer(value["b"], dtype).reshape(value["s"])


def pack_request(request: SampleRequest) -> Map:
    """Return a request's fields."""
    values = {name: getattr(request, name) for name in FIELDS}
    return values | {"target_prompt_tokens": pack_array(request.target_prompt_tokens)}


def unpack_request(value: Map) -> SampleRequest:
    """Return the request.  Raises ValueError, TypeError, KeyError."""
    value = {key: each for key, each in value.items() if key in FIELDS}
    stop = value["stop"]
    return SampleRequest(
        **value
        | {
            "prompt": tuple(value["prompt"]),
            "stop": None if stop is None else tuple(stop),
            "target_prompt_tokens": unpack_array(value["target_prompt_tokens"], np.int64),
        }
    )


def _pack_topk(topk: TopK | None) -> list[Any] | None:
    return None if topk is None else [pack_array(topk.tokens), pack_array(topk.logprobs)]


def _unpack_topk(value: list[Any] | None) -> TopK | None:
    if value is None:
        return None
    return TopK(unpack_array(value[0], np.int32), unpack_array(value[1], np.float32))


def pack_result(result: SampleResult) -> Map:
    """Return a result's fields."""
    return {
        "sequences": [
            [s.tokens, pack_array(s.logprobs), s.stop_reason, _pack_topk(s.topk)]
            for s in result.sequences
        ],
        "prompt_logprobs": pack_array(result.prompt_logprobs),
        "prompt_topk": _pack_topk(result.prompt_topk),
        "target_prompt_logprobs": pack_array(result.target_prompt_logprobs),
        "prompt_alt_tokens": pack_array(result.prompt_alt_tokens),
        "prompt_alt_logprobs": pack_array(result.prompt_alt_logprobs),
    }


def unpack_result(value: Map) -> SampleResult:
    """Return the result."""
    return SampleResult(
        [
            SampledSequence(tokens, unpack_array(logprobs, np.float32), stop, _unpack_topk(topk))
            for tokens, logprobs, stop, topk in value["sequences"]
        ],
        prompt_logprobs=unpack_array(value["prompt_logprobs"], np.float32),
        prompt_topk=_unpack_topk(value["prompt_topk"]),
        target_prompt_logprobs=unpack_array(value["target_prompt_logprobs"], np.float32),
        prompt_alt_tokens=unpack_array(value["prompt_alt_tokens"], np.int32),
        prompt_alt_logprobs=unpack_array(value["prompt_alt_logprobs"], np.float32),
    )


def pack_piece(piece: Piece) -> list[Any]:
    """Return a piece's fields."""
    topk = _pack_topk(piece.topk)
    return [piece.index, piece.tokens, pack_array(piece.logprobs), piece.stop_reason, topk]


def unpack_piece(value: list[Any]) -> Piece:
    """Return the piece."""
    index, tokens, logprobs, stop, topk = value
    return Piece(index, tokens, unpack_array(logprobs, np.float32), stop, _unpack_topk(topk))
