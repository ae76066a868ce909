"""Runs and checkpoints, listed; usage and audit."""

from fastapi import APIRouter

from megatrain.errors import NotFoundError
from megatrain.service.store import checkpoints, runs, usage
from megatrain.service.tinker.access import Admin, Limit, Offset, Reader, TheHub
from megatrain.service.tinker.shown import shown_checkpoint, shown_run, time_of
from megatrain.service.wire.schema import (
    AuditEntry,
    AuditReply,
    CheckpointsReply,
    Cursor,
    TrainingRun,
    TrainingRunsReply,
    WeightsInfoReply,
    WeightsInfoRequest,
)

router = APIRouter(tags=["runs"])


@router.get("/training_runs", response_model_exclude_none=True)
async def list_runs(
    hub: TheHub, who: Reader, limit: Limit = 20, offset: Offset = 0
) -> TrainingRunsReply:
    """Return runs of the caller's project, the newest first."""
    found, total = await hub.store.read(runs.list_page(who.project, limit, offset))
    shown = [shown_run(run, await hub.store.read(checkpoints.last_of(run.id))) for run in found]
    cursor = Cursor(offset=offset, limit=limit, total_count=total)
    return TrainingRunsReply(training_runs=shown, cursor=cursor)


@router.get("/training_runs/{run_id}", response_model_exclude_none=True)
async def get_run(run_id: str, hub: TheHub, who: Reader) -> TrainingRun:
    """Return one run."""
    run = await hub.store.read(runs.get(who.project, run_id))
    if run is None:
        raise NotFoundError(f"there is no training run {run_id!r}")
    return shown_run(run, await hub.store.read(checkpoints.last_of(run.id)))


@router.get("/training_runs/{run_id}/checkpoints", response_model_exclude_none=True)
async def list_run_checkpoints(run_id: str, hub: TheHub, who: Reader) -> CheckpointsReply:
    """Return the checkpoints of a run."""
    if await hub.store.read(runs.get(who.project, run_id)) is None:
        raise NotFoundError(f"there is no training run {run_id!r}")
    found, _ = await hub.store.read(checkpoints.list_page(who.project, run=run_id))
    return CheckpointsReply(checkpoints=[shown_checkpoint(each) for each in found])


@router.get("/checkpoints", response_model_exclude_none=True)
async def list_checkpoints(
    hub: TheHub, who: Reader, limit: Limit = 100, offset: Offset = 0
) -> CheckpointsReply:
    """Return checkpoints of the caller's project, the newest first."""
    found, total = await hub.store.read(
        checkpoints.list_page(who.project, limit=limit, offset=offset)
    )
    return CheckpointsReply(
        checkpoints=[shown_checkpoint(each) for each in found],
        cursor=Cursor(offset=offset, limit=limit, total_count=total),
    )


@router.post("/weights_info", response_model_exclude_none=True)
async def weights_info(body: WeightsInfoRequest, hub: TheHub, who: Reader) -> WeightsInfoReply:
    """Return what a checkpoint is of."""
    record = await hub.checkpoint(who.project, body.tinker_path)
    lora = record.lora
    return WeightsInfoReply.model_validate(
        {
            "base_model": record.base_model,
            "optimizer_config": record.optimizer,
            "is_lora": bool(lora.get("rank")),
            "lora_rank": lora.get("rank") or None,
            "train_unembed": lora.get("train_unembed"),
            "train_mlp": lora.get("train_mlp"),
            "train_attn": lora.get("train_attn"),
        }
    )


@router.get("/audit", response_model_exclude_none=True)
async def audit(hub: TheHub, who: Admin, limit: Limit = 100, offset: Offset = 0) -> AuditReply:
    """Return what keys of the caller's project have done, the newest first."""
    found = await hub.store.read(usage.audit_page(who.project, limit, offset))
    entries = [
        AuditEntry(
            timestamp=time_of(each.time),
            event=each.action,
            event_details={"object": each.object, "key_id": each.key_id},
        )
        for each in found
    ]
    return AuditReply(entries=entries)
