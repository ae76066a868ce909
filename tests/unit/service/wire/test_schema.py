"""Our replies by the client's own models, and its requests by ours."""

import inspect
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from tinker import types as theirs
from tinker.types import (
    audit_log_response,
    checkpoints_list_response,
    client_config_response,
    client_dynamic_config_response,
    copy_weights_response,
    create_sampling_session_response,
    create_session_response,
    current_checkpoint_storage_usage_response,
    external_weights_urls_response,
    future_retrieve_request,
    futures_retrieve_request,
    futures_retrieve_response,
    get_server_capabilities_response,
    get_session_response,
    health_response,
    join_sampling_session_response,
    list_sessions_response,
    load_weights_response,
    request_failed_response,
    save_weights_external_response,
    save_weights_response,
    session_search_request,
    session_search_response,
    telemetry_response,
    training_runs_response,
    try_again_response,
    weights_info_response,
)
from tinker.types._pydantic_types.get_info_response import GetInfoResponse
from tinker.types._pydantic_types.get_sampler_response import GetSamplerResponse
from tinker.types._pydantic_types.optim_step_response import OptimStepResponse
from tinker.types._pydantic_types.save_weights_for_sampler_response import (
    SaveWeightsForSamplerResponseInternal,
)
from tinker.types.shared.untyped_api_future import UntypedAPIFuture

from megatrain.service.wire import schema
from megatrain.service.wire.schema.base import MAX_METADATA_BYTES, Reply, Request

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PATH = "tinker://run/weights/name"
CHECKPOINT = schema.Checkpoint(
    checkpoint_id="weights/name",
    checkpoint_type="training",
    time=NOW,
    tinker_path=PATH,
    size_bytes=3,
    user_metadata={"a": "b"},
    expires_at=NOW,
)
RUN = schema.TrainingRun(
    training_run_id="s:train:0",
    base_model="base",
    model_owner="project",
    is_lora=True,
    lora_rank=8,
    last_request_time=NOW,
    last_checkpoint=CHECKPOINT,
)
CURSOR = schema.Cursor(offset=0, limit=10, total_count=1)

REPLIES: list[tuple[Reply, Any]] = [
    (schema.ClientConfigReply(), client_config_response.ClientConfigResponse),
    (
        schema.ClientDynamicConfigReply(),
        client_dynamic_config_response.ClientDynamicConfigResponse,
    ),
    (schema.HealthReply(), health_response.HealthResponse),
    (
        schema.CapabilitiesReply(supported_models=[schema.SupportedModel(model_name="base")]),
        get_server_capabilities_response.GetServerCapabilitiesResponse,
    ),
    (schema.TelemetryReply(), telemetry_response.TelemetryResponse),
    (schema.CreateSessionReply(session_id="s"), create_session_response.CreateSessionResponse),
    (schema.SessionHeartbeatReply(), theirs.SessionHeartbeatResponse),
    (schema.SessionsReply(sessions=["s"]), list_sessions_response.ListSessionsResponse),
    (
        schema.SessionReply(training_run_ids=["r"], sampler_ids=[], user_metadata={"a": "b"}),
        get_session_response.GetSessionResponse,
    ),
    (
        schema.SessionSearchReply(
            sessions=[
                schema.SessionSummary(
                    session_id="s",
                    created_at=NOW,
                    owner="o",
                    project_id="p",
                    status=status,
                    checkpoints_count=0,
                )
                for status in (
                    None,
                    schema.ActiveStatus(),
                    schema.CancelledStatus(detail="x"),
                    schema.FinishedStatus(reason=schema.ReasonReply(type="interrupted")),
                )
            ],
            next_cursor=schema.NextCursor(last_created_at=NOW, last_session_id="s"),
        ),
        session_search_response.SessionSearchResponse,
    ),
    (schema.CreateModelReply(model_id="r"), theirs.CreateModelResponse),
    (
        schema.GetInfoReply(
            model_data=schema.ModelData(model_name="base"), model_id="r", lora_rank=8
        ),
        GetInfoResponse,
    ),
    (schema.OptimStepReply(metrics={"grad_norm": 1.0}), OptimStepResponse),
    (schema.UnloadModelReply(model_id="r"), theirs.UnloadModelResponse),
    (
        schema.WeightsInfoReply(base_model="base", lora_rank=8, train_mlp=True),
        weights_info_response.WeightsInfoResponse,
    ),
    (schema.SaveWeightsReply(path=PATH), save_weights_response.SaveWeightsResponse),
    (schema.SaveWeightsForSamplerReply(path=PATH), SaveWeightsForSamplerResponseInternal),
    (
        schema.SaveWeightsForSamplerReply(sampling_session_id="s:sample:0"),
        SaveWeightsForSamplerResponseInternal,
    ),
    (
        schema.SaveWeightsExternalReply(path=PATH, size_bytes=3),
        save_weights_external_response.SaveWeightsExternalResponseInternal,
    ),
    (
        schema.LoadWeightsReply(path=PATH, model_id="r"),
        load_weights_response.LoadWeightsResponse,
    ),
    (schema.CopyWeightsReply(tinker_path=PATH), copy_weights_response.CopyWeightsResponse),
    (RUN, theirs.TrainingRun),
    (
        schema.TrainingRunsReply(training_runs=[RUN], cursor=CURSOR),
        training_runs_response.TrainingRunsResponse,
    ),
    (
        schema.CheckpointsReply(checkpoints=[CHECKPOINT], cursor=CURSOR),
        checkpoints_list_response.CheckpointsListResponse,
    ),
    (
        schema.ExternalWeightsUrlsReply(urls={"a": "https://b"}, expires=NOW),
        external_weights_urls_response.ExternalWeightsUrlsResponse,
    ),
    (schema.FutureReply(request_id="f", sample_sequence_ids=["q"]), UntypedAPIFuture),
    (schema.TryAgainReply(request_id="f"), try_again_response.TryAgainResponse),
    (
        schema.FailedReply(error="why", category="user"),
        request_failed_response.RequestFailedResponse,
    ),
    (
        schema.FuturesRetrieveReply(
            completions=[
                schema.Completion(
                    state="finished", request_id="f", response_payload_uncompressed_size=3
                ),
                schema.Completion(state="failed", request_id="g"),
            ],
            cursor=2,
        ),
        futures_retrieve_response.FuturesRetrieveResponse,
    ),
    (
        schema.CreateSamplingSessionReply(sampling_session_id="s"),
        create_sampling_session_response.CreateSamplingSessionResponse,
    ),
    (schema.SamplerReply(sampler_id="s", base_model="base"), GetSamplerResponse),
    (
        schema.JoinSamplingSessionReply(client_counter=1),
        join_sampling_session_response.JoinSamplingSessionResponse,
    ),
    (
        schema.AuditReply(entries=[schema.AuditEntry(timestamp=NOW, event="run_created")]),
        audit_log_response.AuditLogResponse,
    ),
    (
        schema.StorageReply(
            data=[schema.StorageItem(checkpoint_count=1, size_bytes=2, size_gigabytes=0.1)]
        ),
        current_checkpoint_storage_usage_response.CurrentCheckpointStorageUsageResponse,
    ),
]


@pytest.mark.parametrize(
    ("reply", "model"), REPLIES, ids=[f"{i}-{type(r).__name__}" for i, (r, _) in enumerate(REPLIES)]
)
def test_the_client_reads_our_reply_as_we_meant_it(reply, model):
    said = json.loads(reply.model_dump_json(exclude_none=True))
    read = json.loads(model.model_validate(said, strict=False).model_dump_json(exclude_none=True))
    assert _without_defaults(read, said) == said
    assert not {"error", "status"} & said.keys() or isinstance(
        reply, schema.FailedReply | schema.HealthReply | schema.TelemetryReply
    )


def _without_defaults(read: Any, said: Any) -> Any:
    """Return what was read, without what was not said."""
    if isinstance(said, dict):
        return {key: _without_defaults(read.get(key), said[key]) for key in said if key in read} | {
            key: said[key] for key in ("type",) if key in said and key not in read
        }
    if isinstance(said, list):
        return [_without_defaults(a, b) for a, b in zip(read, said, strict=True)]
    return read


def test_defaults_of_the_client_s_configuration_are_the_client_s_own():
    """So that only what an operator sets differs; fields are all known to the client."""
    for ours, model in REPLIES[:2]:
        assert ours.model_dump() == model().model_dump()


REQUESTS: list[tuple[BaseModel, type[Request]]] = [
    (
        theirs.CreateSessionRequest(tags=["a"], user_metadata={"a": 1}, sdk_version="0.38.0"),
        schema.CreateSessionRequest,
    ),
    (theirs.SessionHeartbeatRequest(session_id="s"), schema.SessionHeartbeatRequest),
    (session_search_request.SessionSearchRequest(), schema.SessionSearchRequest),
    (
        theirs.CreateModelRequest(
            session_id="s",
            model_seq_id=0,
            base_model="base",
            user_metadata={"a": {"b": [1]}},
            lora_config=theirs.LoraConfig(rank=8, seed=3, train_mlp=False),
        ),
        schema.CreateModelRequest,
    ),
    (theirs.GetInfoRequest(model_id="r"), schema.GetInfoRequest),
    (
        theirs.OptimStepRequest(model_id="r", seq_id=2, adam_params=theirs.AdamParams()),
        schema.OptimStepRequest,
    ),
    (
        theirs.OptimStepRequest(
            model_id="r",
            seq_id=2,
            optimizer_params=theirs.optimizer.DimuonParams(learning_rate=0.1),
        ),
        schema.OptimStepRequest,
    ),
    (theirs.UnloadModelRequest(model_id="r"), schema.UnloadModelRequest),
    (
        theirs.SaveWeightsRequest(
            model_id="r", path="n", seq_id=1, ttl_seconds=3600, user_metadata={"a": "b"}
        ),
        schema.SaveWeightsRequest,
    ),
    (
        theirs.SaveWeightsForSamplerRequest(model_id="r", seq_id=1, sampling_session_seq_id=0),
        schema.SaveWeightsForSamplerRequest,
    ),
    (
        theirs.LoadWeightsRequest(model_id="r", seq_id=1, path=PATH, optimizer=True),
        schema.LoadWeightsRequest,
    ),
    (
        theirs.LoadWeightsRequest(session_id="s", model_seq_id=1, path=PATH, optimizer=False),
        schema.LoadWeightsRequest,
    ),
    (
        theirs.CreateSamplingSessionRequest(
            session_id="s", sampling_session_seq_id=0, model_path=PATH
        ),
        schema.CreateSamplingSessionRequest,
    ),
    (
        future_retrieve_request.FutureRetrieveRequest(request_id="f", allow_metadata_only=True),
        schema.FutureRetrieveRequest,
    ),
    (
        futures_retrieve_request.FuturesRetrieveRequest(
            target=futures_retrieve_request.SamplingSessionFuturesTarget(sampling_session_id="s"),
            prev_cursor=3,
            timeout=0,
            retrieved_request_ids=["f"],
        ),
        schema.FuturesRetrieveRequest,
    ),
]


@pytest.mark.parametrize(
    ("sent", "model"),
    REQUESTS,
    ids=[f"{i}-{model.__name__}" for i, (_, model) in enumerate(REQUESTS)],
)
def test_we_read_the_client_s_request_as_it_meant_it(sent, model):
    body = json.loads(sent.model_dump_json(exclude_none=True))
    read = model.model_validate(body | {"a_key_of_tomorrow": {"x": 1}})
    said = json.loads(read.model_dump_json())
    for key, value in body.items():
        if key in said:  # the type of the request is the endpoint's
            assert _without_defaults(said[key], value) == value
    assert body.keys() - said.keys() <= {"type"}


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (schema.LoadWeightsRequest, {"path": PATH, "optimizer": True}),
        (schema.LoadWeightsRequest, {"path": PATH, "model_id": "r", "session_id": "s"}),
        (schema.LoadWeightsRequest, {"path": "/etc/passwd", "model_id": "r"}),
        (schema.CopyWeightsRequest, {"source_path": PATH}),
        (schema.OptimStepRequest, {"model_id": "r", "adam_params": {"beta1": 1.0}}),
        (schema.OptimStepRequest, {"model_id": "r", "adam_params": {"learning_rate": 1e300}}),
        (schema.OptimStepRequest, {"model_id": "r", "seq_id": 1 << 31}),
        (
            schema.OptimStepRequest,
            {"model_id": "r", "adam_params": {}, "optimizer_params": {"type": "dimuon"}},
        ),
        (schema.SaveWeightsRequest, {"model_id": "r", "path": "n", "ttl_seconds": 1}),
        (schema.SetTtlRequest, {"ttl_seconds": 10**10}),
        (schema.CreateSessionRequest, {"user_metadata": {"a": "x" * MAX_METADATA_BYTES}}),
        (schema.SessionSearchRequest, {"limit": 201}),
        (schema.GetInfoRequest, {"model_id": "r" * 10_000}),
    ],
)
def test_bodies_out_of_bounds_are_refused(model, body):
    with pytest.raises(ValidationError):
        model.model_validate(body)


def test_metadata_may_not_be_nested_without_end():
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"a": deep}
    with pytest.raises(ValidationError, match="nested"):
        schema.CreateSessionRequest.model_validate({"user_metadata": deep})


def _requests() -> list[type[Request]]:
    found = inspect.getmembers(schema, inspect.isclass)
    return [model for _, model in found if issubclass(model, Request)]


@pytest.mark.parametrize("model", _requests(), ids=lambda model: model.__name__)
def test_texts_lists_and_numbers_of_requests_have_bounds(model):
    described = TypeAdapter(model).json_schema()
    for owner in (described, *described.get("$defs", {}).values()):
        for name, field in owner.get("properties", {}).items():
            for kind in field.get("anyOf", [field]):
                _check_bounds(f"{owner.get('title')}.{name}", kind)


def _check_bounds(what: str, kind: dict[str, Any]) -> None:
    if "const" in kind or "enum" in kind or "format" in kind:
        return
    match kind.get("type"):
        case "string":
            assert "maxLength" in kind, what
        case "array":
            assert "maxItems" in kind, what
            for each in kind["items"].get("anyOf", [kind["items"]]):
                _check_bounds(what, each)
        case "integer" | "number":
            assert {"maximum", "exclusiveMaximum"} & kind.keys(), what
            assert {"minimum", "exclusiveMinimum"} & kind.keys(), what


def test_a_time_without_a_zone_is_said_with_one():
    naive = NOW.replace(tzinfo=None)
    said = CHECKPOINT.model_copy(update={"time": naive}).model_dump()
    read = schema.Checkpoint.model_validate(said)
    assert read.time.tzinfo is not None
    assert json.loads(read.model_dump_json())["time"].endswith("Z")
