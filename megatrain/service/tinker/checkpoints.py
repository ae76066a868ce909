"""What is done to one checkpoint: published, kept, copied, taken away, deleted."""

import asyncio
import shutil
import time
import uuid
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse

from megatrain.errors import DataError, NotFoundError
from megatrain.service.auth.principal import Principal
from megatrain.service.hub import Hub
from megatrain.service.store import checkpoints
from megatrain.service.store.records import Checkpoint
from megatrain.service.tinker.access import Json, Reader, TheHub, Trainer, address_of
from megatrain.service.tinker.shown import time_of
from megatrain.service.tinker.told import told
from megatrain.service.wire.schema import (
    CopyWeightsReply,
    CopyWeightsRequest,
    Empty,
    ExternalWeightsUrlsReply,
    SetTtlRequest,
)
from megatrain.service.work.saves import KINDS, check_number, key_of

router = APIRouter(tags=["checkpoints"])

_ONE = "/training_runs/{run_id}/checkpoints/{checkpoint_id:path}"
RunId = Annotated[str, Path(max_length=128)]
CheckpointId = Annotated[str, Path(max_length=300)]


async def _own(hub: Hub, who: Principal, run_id: str, checkpoint_id: str) -> Checkpoint:
    path = f"tinker://{run_id}/{checkpoint_id}"
    record = await hub.store.read(checkpoints.get(who.project, path))
    if record is None:
        raise NotFoundError(f"there is no checkpoint {path!r}")
    return record


@router.post(_ONE + "/publish", status_code=204)
async def publish(
    run_id: RunId, checkpoint_id: CheckpointId, request: Request, hub: TheHub, who: Trainer
) -> Response:
    """Let every key of this service read a checkpoint."""
    return await _publish(run_id, checkpoint_id, request, hub, who, public=True)


@router.delete(_ONE + "/publish", status_code=204)
async def unpublish(
    run_id: RunId, checkpoint_id: CheckpointId, request: Request, hub: TheHub, who: Trainer
) -> Response:
    """Keep a checkpoint for its own project again."""
    return await _publish(run_id, checkpoint_id, request, hub, who, public=False)


async def _publish(
    run_id: str, checkpoint_id: str, request: Request, hub: Hub, who: Principal, *, public: bool
) -> Response:
    record = await _own(hub, who, run_id, checkpoint_id)
    await hub.store.write(checkpoints.set_fields(record.path, public=public))
    action = "checkpoint_publish" if public else "checkpoint_unpublish"
    await hub.auth.audit(who, action, record.path, address_of(request))
    return Response(status_code=204)


@router.put(_ONE + "/ttl", **told(Empty))
async def set_ttl(
    run_id: RunId, checkpoint_id: CheckpointId, body: SetTtlRequest, hub: TheHub, who: Trainer
) -> Json:
    """Let a checkpoint expire after some seconds from now, or stay."""
    record = await _own(hub, who, run_id, checkpoint_id)
    ttl = body.ttl_seconds
    expires = None if ttl is None else time.time() + ttl
    await hub.store.write(checkpoints.set_fields(record.path, expires=expires))
    return {}


@router.get(_ONE + "/external_weights_urls")
async def external_weights_urls(
    run_id: RunId, checkpoint_id: CheckpointId, request: Request, hub: TheHub, who: Reader
) -> ExternalWeightsUrlsReply:
    """Return URLs of a checkpoint's files, which work without a key for an hour."""
    record = await _own(hub, who, run_id, checkpoint_id)
    base = hub.config.public_url or str(request.base_url).rstrip("/")
    urls, ends = {}, time.time()
    for name in await hub.files.manifest(record.location):
        ticket, ends = hub.signer.sign(record.location, name)
        urls[name] = f"{base}/api/v1/files/{ticket}"
    return ExternalWeightsUrlsReply(urls=urls, expires=time_of(ends))


@router.get("/files/{ticket}", response_model=None)
async def download(ticket: Annotated[str, Path(max_length=2000)], hub: TheHub) -> Response:
    """Return a file that was signed for."""
    key, name = hub.signer.check(ticket)
    size = (await hub.files.manifest(key)).get(name, {}).get("size")
    if size is None:
        raise NotFoundError(f"there is no file {name!r}")

    async def pieces():  # type: ignore[no-untyped-def]
        place = 0
        while place < size:
            piece = await hub.files.read(key, name, place)
            if not piece:
                return
            place += len(piece)
            yield piece

    return StreamingResponse(
        pieces(),
        media_type="application/octet-stream",
        headers={"content-length": str(size)},
    )


@router.delete(_ONE, status_code=204)
async def delete(
    run_id: RunId, checkpoint_id: CheckpointId, request: Request, hub: TheHub, who: Trainer
) -> Response:
    """Delete a checkpoint and its files."""
    record = await _own(hub, who, run_id, checkpoint_id)
    await hub.delete_checkpoint(record)
    await hub.auth.audit(who, "checkpoint_delete", record.path, address_of(request))
    return Response(status_code=204)


@router.post("/copy_weights")
async def copy_weights(body: CopyWeightsRequest, hub: TheHub, who: Trainer) -> CopyWeightsReply:
    """Copy a checkpoint into a run of the caller's session."""
    source = await hub.checkpoint(who.project, body.source_path)
    if body.destination_project_id is not None:
        if body.destination_project_id != who.project:
            raise NotFoundError(f"there is no project {body.destination_project_id!r} of this key")
        run = source.run if source.project == who.project else f"copies-of-{source.run}"
        name = f"{source.name}-copy-{uuid.uuid4().hex[:8]}"
    else:
        session = hub.sessions.alive(who.project, str(body.session_id))
        run, name = f"{session.id}:train:{body.model_seq_id}", source.name
    path = f"tinker://{run}/{KINDS[source.kind]}/{name}"
    if await hub.store.read(checkpoints.get(who.project, path)) is not None:
        raise DataError(f"there is a checkpoint {path} already")
    count, _ = await hub.store.read(checkpoints.sizes(who.project))
    check_number(count, hub.config.limits.max_checkpoints)
    await _copy(hub, source, path)
    expires = None if body.ttl_seconds is None else time.time() + body.ttl_seconds
    copy = replace(
        source,
        path=path,
        run=run,
        project=who.project,
        name=name,
        created=time.time(),
        public=False,
        expires=expires,
        location=key_of(path),
    )
    await hub.store.write(checkpoints.put(copy))
    return CopyWeightsReply(tinker_path=path)


async def _copy(hub: Hub, source: Checkpoint, path: str) -> None:
    folder = await hub.files.local_folder(source.location)
    place = hub.files.scratch / f"copy-{time.monotonic_ns()}"
    try:
        await asyncio.to_thread(shutil.copytree, folder, place)
        await hub.files.put_folder(key_of(path), place)
    finally:
        await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
