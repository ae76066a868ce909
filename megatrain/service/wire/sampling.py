"""asample: a body as a request to a sampler, and a sampler's result as a client reads it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatrain.config.service import Limits
from megatrain.errors import DataError
from megatrain.sampler.types import IntArray, SampledSequence, SampleRequest, SampleResult, TopK
from megatrain.service.wire import tinker_wire_pb2 as wire
from megatrain.service.wire.check import check_ids
from megatrain.service.wire.passes import not_text
from megatrain.service.wire.schema.sampling import SampleBody, SamplingParams, TargetTokens
from megatrain.service.wire.tensors import Room, csr_cells, tensor_of_json

_MAX_SEED = (1 << 63) - 1


def to_sample_request(
    body: SampleBody,
    limits: Limits,
    *,
    vocab_size: int,
    max_context_length: int,
    adapter: str | None = None,
) -> SampleRequest:
    """Return what a body asks of a sampler.  Raises DataError, in one sentence."""
    params = body.sampling_params
    prompt = prompt_of(body, vocab_size)
    max_tokens = _max_tokens(params.max_tokens, len(prompt), limits, max_context_length)
    _check_counts(body, len(prompt), limits)
    return SampleRequest(
        prompt=prompt,
        adapter=adapter,
        num_samples=body.num_samples,
        max_tokens=max_tokens,
        temperature=params.temperature,
        top_k=params.top_k or -1,
        top_p=params.top_p,
        seed=None if params.seed is None else params.seed % _MAX_SEED,
        stop=_stop(params, vocab_size),
        topk_sample_logprobs=body.topk_sample_logprobs,
        prompt_logprobs=bool(body.prompt_logprobs),
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        target_prompt_tokens=_targets(body, len(prompt), limits, vocab_size),
        prompt_alt_tokens_k=body.prompt_alt_tokens_k,
    )


def prompt_of(body: SampleBody, vocab_size: int) -> tuple[int, ...]:
    """Return the tokens of a body's prompt.  Raises DataError."""
    tokens: list[int] = []
    for chunk in body.prompt.chunks:
        if chunk.type != "encoded_text" or chunk.tokens is None:
            raise not_text("the prompt", chunk.type)
        tokens += chunk.tokens
    if not tokens:
        raise DataError("the prompt is empty")
    check_ids("the prompt", np.array(tokens, dtype=np.int64), vocab_size)
    return tuple(tokens)


def _max_tokens(given: int | None, prompt: int, limits: Limits, max_context_length: int) -> int:
    room = max_context_length - prompt
    if room < 1:
        raise DataError(
            f"a prompt of {prompt} tokens leaves no room in a context of {max_context_length}"
        )
    if given is None:
        return min(room, limits.max_new_tokens)
    if not 0 < given <= limits.max_new_tokens:
        raise DataError(f"max_tokens must be from 1 to {limits.max_new_tokens}, not {given}")
    if given > room:
        raise DataError(
            f"a prompt of {prompt} tokens with max_tokens={given} is longer than the context of"
            f" {max_context_length}"
        )
    return given


def _check_counts(body: SampleBody, prompt: int, limits: Limits) -> None:
    if body.num_samples > limits.max_samples:
        raise DataError(f"num_samples must be from 1 to {limits.max_samples}")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        if getattr(body, name) > limits.max_targets:
            raise DataError(f"{name} must be from 0 to {limits.max_targets}")
    last = body.prompt_logprobs_last_n
    if last is not None and not body.prompt_logprobs:
        raise DataError("prompt_logprobs_last_n needs prompt_logprobs")
    if last is not None and not 0 < last < prompt:
        raise DataError(f"prompt_logprobs_last_n must be from 1 to {prompt - 1}, not {last}")


def _stop(params: SamplingParams, vocab_size: int) -> tuple[str, ...] | tuple[int, ...] | None:
    stop = params.stop
    if stop is None:
        return None
    if isinstance(stop, str):
        stop = [stop]
    texts = tuple(each for each in stop if isinstance(each, str))
    if texts:
        if "" in texts:
            raise DataError("a stop sequence must not be empty")
        return texts
    tokens = tuple(each for each in stop if isinstance(each, int))
    check_ids("stop", np.array(tokens, dtype=np.int64), vocab_size)
    return tokens


def _targets(body: SampleBody, prompt: int, limits: Limits, vocab_size: int) -> IntArray | None:
    given = body.target_prompt_logprobs
    if given is None:
        return None
    what = "target_prompt_logprobs"
    # Cells that a sparse one leaves out ask for nothing.
    array = tensor_of_json(what, given.model_dump(), Room(limits.max_body_bytes // 4), fill=-1)
    if array.ndim != 2 or len(array) != prompt - 1 or not 0 < array.shape[1] <= limits.max_targets:
        raise DataError(
            f"{what} must have shape [{prompt - 1}, K], K from 1 to {limits.max_targets},"
            f" not {list(array.shape)}"
        )
    check_ids(what, array, vocab_size, least=-1)
    return array.astype(np.int64)


def encode_sample_result(result: SampleResult, targets: TargetTokens | None = None) -> bytes:
    """Return a SampleResponse.

    `targets` are those of the request: where they are sparse, so are their log-probabilities.
    """
    message = wire.SampleResponse(
        sequences=[_sequence(each) for each in result.sequences],
        prompt_cache_hit_tokens=result.prompt_cache_hit_tokens,
    )
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = _floats(result.prompt_logprobs)
    if result.prompt_topk is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk(result.prompt_topk))
    if result.target_prompt_logprobs is not None:
        scores = _target_scores(result.target_prompt_logprobs, targets)
        message.target_prompt_logprobs.CopyFrom(scores)
    if result.prompt_alt_tokens is not None and result.prompt_alt_logprobs is not None:
        tokens = result.prompt_alt_tokens.astype("<i8")
        message.prompt_alt_tokens.tokens.CopyFrom(
            wire.Tensor(dense=tokens.tobytes(), dtype=wire.DTYPE_INT64, shape=tokens.shape)
        )
        message.prompt_alt_tokens.logprobs.CopyFrom(_float_tensor(result.prompt_alt_logprobs))
    return bytes(message.SerializeToString())


def _sequence(sequence: SampledSequence) -> wire.SampledSequence:
    ended = sequence.stop_reason == "stop"
    message = wire.SampledSequence(
        stop_reason=wire.STOP_REASON_STOP if ended else wire.STOP_REASON_LENGTH,
        tokens=np.asarray(sequence.tokens, dtype="<i4").tobytes(),
        logprobs=_floats(sequence.logprobs),
    )
    if sequence.topk is not None:
        message.topk_sampled_logprobs.CopyFrom(_topk(sequence.topk))
    return message


def _topk(table: TopK) -> wire.TopkLogprobs:
    length, k = table.tokens.shape
    return wire.TopkLogprobs(
        token_ids=np.ascontiguousarray(table.tokens, dtype="<i4").tobytes(),
        logprobs=_floats(table.logprobs),
        k=k,
        length=length,
    )


def _target_scores(scores: Any, targets: TargetTokens | None) -> wire.Tensor:
    if targets is None or targets.sparse_crow_indices is None:
        return _float_tensor(scores)
    crow, col = (
        np.array(each or [], dtype=np.int64)
        for each in (targets.sparse_crow_indices, targets.sparse_col_indices)
    )
    shape: Sequence[int] = scores.shape
    rows, columns = csr_cells("targets", len(targets.data), crow, col, shape, Room(scores.size))
    return wire.Tensor(
        sparse_csr=wire.SparseCsr(
            values=_floats(scores[rows, columns]),
            crow_indices=crow.astype("<i8").tobytes(),
            col_indices=col.astype("<i8").tobytes(),
        ),
        dtype=wire.DTYPE_FLOAT32,
        shape=shape,
    )


def _float_tensor(array: Any) -> wire.Tensor:
    return wire.Tensor(dense=_floats(array), dtype=wire.DTYPE_FLOAT32, shape=array.shape)


def _floats(array: Any) -> bytes:
    return np.ascontiguousarray(array, dtype="<f4").tobytes()
