"""What changes a model: passes, steps, weights in and out."""

import asyncio
import json
import uuid
from typing import Any

from fastapi import APIRouter, Request

from megatrain.errors import ConfigError, DataError, DeniedError, MegatrainError, NotFoundError
from megatrain.service.auth.principal import Principal
from megatrain.service.deployment import Deployment
from megatrain.service.hub import Hub
from megatrain.service.intake import new_run
from megatrain.service.tinker.access import LARGE_BYTES, Json, Reader, TheHub, Trainer
from megatrain.service.tinker.told import told
from megatrain.service.wire.bodies import parse_json, read_body
from megatrain.service.wire.check import check_pass
from megatrain.service.wire.passes import decode_pass, json_to_pass
from megatrain.service.wire.schema import (
    CreateCustomLossRequest,
    CreateModelRequest,
    FutureReply,
    GetInfoReply,
    GetInfoRequest,
    LoadWeightsRequest,
    OptimStepRequest,
    SaveWeightsExternalRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
    UnloadModelRequest,
)
from megatrain.service.wire.types import PassRequest
from megatrain.service.work.operations import check_optimizer, step_options
from megatrain.service.work.ticket import Ticket

router = APIRouter(tags=["training"])

DEFAULT_OPTIMIZER = {"type": "adamw"}


def accepted(ticket: Ticket) -> Json:
    """Return what a client is told of a request that was accepted."""
    return {"request_id": ticket.id, **ticket.reply}


def packed(content: Json) -> bytes:
    """Return a request as the database keeps it."""
    return json.dumps(content, separators=(",", ":")).encode()


@router.post("/create_model", **told(FutureReply))
async def create_model(body: CreateModelRequest, hub: TheHub, who: Trainer) -> Json:
    """Make a new adapter on a base model."""
    hub.check_ready()
    session = hub.sessions.alive(who.project, body.session_id)
    deployment = hub.deployment(body.base_model)
    content = body.model_dump()
    lora = content.get("lora_config")
    refused: MegatrainError | None = None
    optimizer = DEFAULT_OPTIMIZER
    try:
        optimizer = check_optimizer(content.get("optimizer_config") or DEFAULT_OPTIMIZER)
        deployment.fleet.whole.check(is_lora=lora is not None)
        _check_lora(hub, lora)
    except MegatrainError as error:
        refused = error
    record = new_run(
        session.id,
        body.model_seq_id,
        who.project,
        deployment.name,
        lora=lora,
        optimizer=optimizer,
        user_metadata=content.get("user_metadata") or {},
    )
    return accepted(await _create(hub, who, deployment, record, "create_model", content, refused))


def _check_lora(hub: Hub, lora: Json | None) -> None:
    if lora is None:
        return
    most = hub.config.limits.max_lora_rank
    if not 1 <= lora["rank"] <= most:
        raise ConfigError(f"a rank must be between 1 and {most} here: {lora['rank']}")
    if not (lora["train_attn"] or lora["train_mlp"] or lora["train_unembed"]):
        raise ConfigError("train_attn, train_mlp and train_unembed are all False: nothing is left")


async def _create(
    hub: Hub,
    who: Principal,
    deployment: Deployment,
    record: Any,
    kind: str,
    content: Json,
    refused: MegatrainError | None,
) -> Ticket:
    ticket = await hub.intake.create(
        who,
        deployment,
        record,
        kind,
        refused or content,
        packed(content),
        max_runs=hub.config.limits.max_runs,
    )
    await hub.check_alive(record.session)
    return ticket


@router.post("/get_info", **told(GetInfoReply))
async def get_info(body: GetInfoRequest, hub: TheHub, who: Reader) -> Json:
    """Return what a model is."""
    deployment, run = hub.intake.run(who.project, body.model_id)
    base = deployment.fleet.base
    data = {"arch": base.arch, "model_name": base.name, "tokenizer_id": base.tokenizer_id}
    return {
        "type": "get_info",
        "model_data": data,
        "model_id": run.id,
        "is_lora": run.record.is_lora,
        "lora_rank": run.record.lora_rank or None,
        "model_name": base.name,
        "optimizer_config": run.record.optimizer,
    }


@router.post("/forward_backward", **told(FutureReply))
async def forward_backward(request: Request, hub: TheHub, who: Trainer) -> Json:
    """Add the gradients of a batch, or only look (forward_only)."""
    return await _pass(request, hub, who, forward_only=False)


@router.post("/forward", **told(FutureReply))
async def forward(request: Request, hub: TheHub, who: Trainer) -> Json:
    """Return log-probabilities and loss of a batch, as older clients ask for them."""
    return await _pass(request, hub, who, forward_only=True)


async def _pass(request: Request, hub: Hub, who: Principal, *, forward_only: bool) -> Json:
    hub.check_ready()
    limits = hub.config.limits
    body = await read_body(request, limits.max_body_bytes)
    is_json = "json" in request.headers.get("content-type", "")

    def parse() -> PassRequest:
        if is_json:
            return json_to_pass(parse_json(body), limits, forward_only=forward_only)
        return decode_pass(body, limits)

    parsed = parse() if len(body) < LARGE_BYTES else await asyncio.to_thread(parse)
    deployment, run = hub.intake.run(who.project, parsed.model_id)
    base = deployment.fleet.base
    content: Any = parsed
    try:
        check_pass(
            parsed,
            limits,
            vocab_size=base.vocab_size,
            max_context_length=base.max_context_length,
        )
    except MegatrainError as error:
        content = error
    kind = "forward" if parsed.forward_only else "forward_backward"
    ticket = await hub.intake.train(
        who, kind, run.id, parsed.seq_id, content, body, tokens=parsed.num_tokens
    )
    return accepted(ticket)


@router.post("/optim_step", **told(FutureReply))
async def optim_step(body: OptimStepRequest, hub: TheHub, who: Trainer) -> Json:
    """Let the optimizer change the model."""
    hub.check_ready()
    _, run = hub.intake.run(who.project, body.model_id)
    content: Any = body.model_dump(exclude_none=True)
    payload = packed(content)
    try:
        step_options(run, content)
    except MegatrainError as error:
        content = error
    seq = hub.intake.seq(who.project, run.id, body.seq_id)
    return accepted(await hub.intake.train(who, "optim_step", run.id, seq, content, payload))


@router.post("/save_weights", **told(FutureReply))
async def save_weights(body: SaveWeightsRequest, hub: TheHub, who: Trainer) -> Json:
    """Save all that training needs to go on."""
    return await _file(body, "save_weights", hub, who)


@router.post("/save_weights_external", **told(FutureReply))
async def save_weights_external(
    body: SaveWeightsExternalRequest, hub: TheHub, who: Trainer
) -> Json:
    """Save an adapter to take away."""
    return await _file(body, "save_weights_external", hub, who)


@router.post("/save_weights_for_sampler", **told(FutureReply))
async def save_weights_for_sampler(
    body: SaveWeightsForSamplerRequest, hub: TheHub, who: Trainer
) -> Json:
    """Save an adapter for sampling: under a name, or for a sampling session of its own."""
    return await _file(body, "save_weights_for_sampler", hub, who)


async def _file(body: Any, kind: str, hub: Hub, who: Principal) -> Json:
    hub.check_ready()
    content: Any = body.model_dump(exclude_none=True)
    if kind == "save_weights" and body.path is None:
        content["path"] = f"save-{uuid.uuid4().hex[:12]}"
    payload = packed(content)
    if content.get("age_encryption_recipients"):
        content = ConfigError("this service does not encrypt weights with age keys")
    elif content.get("path") is not None:
        try:
            hub.files.check_name(content["path"])
        except MegatrainError as error:
            content = error
    elif kind != "save_weights_for_sampler" or content.get("sampling_session_seq_id") is None:
        content = DataError("weights need a path, or a sampling_session_seq_id")
    seq = hub.intake.seq(who.project, body.model_id, body.seq_id)
    return accepted(await hub.intake.train(who, kind, body.model_id, seq, content, payload))


@router.post("/load_weights", **told(FutureReply))
async def load_weights(body: LoadWeightsRequest, hub: TheHub, who: Trainer) -> Json:
    """Load a checkpoint: into a model, or as a new one."""
    hub.check_ready()
    content = body.model_dump(exclude_none=True)
    if body.model_id is not None and body.seq_id is not None:
        ticket = await hub.intake.train(
            who, "load_weights", body.model_id, body.seq_id, content, packed(content)
        )
        return accepted(ticket)
    if body.session_id is None or body.model_seq_id is None:
        raise DataError("load_weights needs model_id and seq_id, or session_id and model_seq_id")
    return accepted(await _create_from(body, content, hub, who))


async def _create_from(body: LoadWeightsRequest, content: Json, hub: Hub, who: Principal) -> Ticket:
    assert body.session_id is not None
    assert body.model_seq_id is not None
    session = hub.sessions.alive(who.project, body.session_id)
    if body.weights_access_token is not None:
        raise DeniedError("weights_access_token is of another service: keys decide here")
    source = await hub.checkpoint(who.project, body.path)
    refused: MegatrainError | None = None
    optimizer = dict(source.optimizer) if body.optimizer else DEFAULT_OPTIMIZER
    try:
        is_lora = bool(source.lora.get("rank"))
        hub.deployment(body.base_model or source.base_model).fleet.whole.check(is_lora=is_lora)
        if body.optimizer_config is not None:
            optimizer = check_optimizer(content["optimizer_config"])
        if body.optimizer and optimizer != source.optimizer:
            raise ConfigError("an optimizer's state is loaded as it was: leave the config out")
    except MegatrainError as error:
        refused = error
    base_model = body.base_model or source.base_model
    record = new_run(
        session.id,
        body.model_seq_id,
        who.project,
        hub.deployment(base_model).name,
        lora=source.lora if source.lora.get("rank") else None,
        optimizer=optimizer,
        user_metadata=content.get("user_metadata") or {},
        source=source.path,
    )
    deployment = hub.deployment(base_model)
    return await _create(hub, who, deployment, record, "load_weights", content, refused)


@router.post("/unload_model", **told(FutureReply))
async def unload_model(body: UnloadModelRequest, hub: TheHub, who: Trainer) -> Json:
    """Give a model back, as older clients do: with a number, or after all others."""
    hub.check_ready()
    seq = hub.intake.seq(who.project, body.model_id, body.seq_id)
    content = body.model_dump(exclude_none=True)
    return accepted(
        await hub.intake.train(who, "unload_model", body.model_id, seq, content, packed(content))
    )


@router.post("/create_custom_loss")
async def create_custom_loss(body: CreateCustomLossRequest, hub: TheHub, who: Trainer) -> Json:
    """Refuse: clients evaluate losses of their own themselves here."""
    raise NotFoundError(
        "this service takes no losses as graphs (custom_loss_server_side is off)",
        hint="forward_backward_custom evaluates a loss on the client",
    )
