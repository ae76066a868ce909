"""Sampling sessions, and requests to them."""

from typing import Annotated, Literal

from pydantic import Field

from megatrain.service.wire.schema.base import (
    MAX_INT,
    ModelName,
    Reply,
    Request,
    SamplerId,
    SessionId,
    Slot,
    TinkerPath,
    Token,
)

_Index = Annotated[int, Field(ge=-1, le=MAX_INT)]
_MAX_TOKENS = 1 << 22
_TopK = Annotated[int, Field(ge=0, le=1 << 20)]


class CreateSamplingSessionRequest(Request):
    """POST create_sampling_session."""

    session_id: SessionId
    sampling_session_seq_id: Slot
    base_model: ModelName | None = None
    model_path: TinkerPath | None = None


class CreateSamplingSessionReply(Reply):
    """A sampling session."""

    sampling_session_id: str
    type: Literal["create_sampling_session"] = "create_sampling_session"


class SamplerReply(Reply):
    """GET samplers/{id}."""

    sampler_id: str
    base_model: str
    model_path: str | None = None


class JoinSamplingSessionRequest(Request):
    """POST join_sampling_session."""

    sampling_session_id: SamplerId


class JoinSamplingSessionReply(Reply):
    """A number of one client of a sampling session, which no other has."""

    client_counter: int
    type: Literal["join_sampling_session"] = "join_sampling_session"


class Chunk(Request):
    """Part of a prompt.  Of other kinds than text only the type is read, to refuse it."""

    type: str = Field(default="encoded_text", max_length=64)
    tokens: list[Token] | None = Field(default=None, max_length=_MAX_TOKENS)


class ModelInput(Request):
    """A prompt."""

    chunks: list[Chunk] = Field(max_length=1 << 16)


class TargetTokens(Request):
    """Token ids [len(prompt) - 1, K] to score, dense or sparse; -1: none."""

    data: list[_Index] = Field(max_length=_MAX_TOKENS)
    dtype: Literal["int64"]
    shape: list[Annotated[int, Field(ge=0, le=MAX_INT)]] | None = Field(default=None, max_length=8)
    sparse_crow_indices: list[_Index] | None = Field(default=None, max_length=_MAX_TOKENS)
    sparse_col_indices: list[_Index] | None = Field(default=None, max_length=_MAX_TOKENS)


_Text = Annotated[str, Field(max_length=4096)]
Stop = (
    _Text
    | Annotated[list[Token], Field(max_length=256)]
    | Annotated[list[_Text], Field(max_length=256)]
)


class SamplingParams(Request):
    """How to draw."""

    max_tokens: int | None = Field(default=None, ge=0, le=1 << 31)
    """None: as many as the context has room for."""
    seed: int | None = Field(default=None, ge=-(1 << 64), le=(1 << 64))
    stop: Stop | None = None
    """None: the model's end-of-sequence tokens; []: nothing."""
    temperature: float = Field(default=1.0, ge=0, le=1e6)
    top_k: int = Field(default=-1, ge=-1, le=1 << 31)
    """-1, or 0: all."""
    top_p: float = Field(default=1.0, gt=0, le=1)


class SampleBody(Request):
    """POST asample."""

    num_samples: int = Field(default=1, ge=1, le=1 << 16)
    prompt: ModelInput
    sampling_params: SamplingParams = SamplingParams()
    base_model: ModelName | None = None
    model_path: TinkerPath | None = None
    sampling_session_id: SamplerId | None = None
    seq_id: int | None = Field(default=None, ge=0, le=MAX_INT)
    """Number within the sampling session; not contiguous."""
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: _TopK = 0
    topk_sample_logprobs: _TopK = 0
    target_prompt_logprobs: TargetTokens | None = None
    prompt_alt_tokens_k: _TopK = 0
    prompt_logprobs_last_n: int | None = Field(default=None, ge=1, le=1 << 31)
    record_stability_info: bool | None = None
    """Accepted, without effect: the loss that it is for is not served."""
