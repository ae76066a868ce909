"""Runs and checkpoints as clients see them."""

from datetime import UTC, datetime
from typing import Any

from megatrain.service.store.records import Checkpoint, Run
from megatrain.service.wire.schema import Checkpoint as ShownCheckpoint
from megatrain.service.wire.schema import TrainingRun
from megatrain.service.work.saves import KINDS


def time_of(seconds: float) -> datetime:
    """Return a time with its zone."""
    return datetime.fromtimestamp(seconds, UTC)


def text_metadata(metadata: dict[str, Any]) -> dict[str, str] | None:
    """Return metadata with values as texts, which is what clients take."""
    return {str(key): str(value) for key, value in metadata.items()} or None


def checkpoint_id(record: Checkpoint) -> str:
    """Return weights/NAME, sampler_weights/NAME or external_weights/NAME."""
    return f"{KINDS[record.kind]}/{record.name}"


def shown_checkpoint(record: Checkpoint) -> ShownCheckpoint:
    """Return a checkpoint as clients see it."""
    return ShownCheckpoint.model_validate(
        {
            "checkpoint_id": checkpoint_id(record),
            "checkpoint_type": record.kind,
            "time": time_of(record.created),
            "tinker_path": record.path,
            "size_bytes": record.size_bytes,
            "public": record.public,
            "user_metadata": text_metadata(record.user_metadata),
            "expires_at": None if record.expires is None else time_of(record.expires),
        }
    )


def shown_run(run: Run, last: dict[str, Checkpoint]) -> TrainingRun:
    """Return a run as clients see it; `last` are its newest checkpoints by kind."""
    training, sampler = last.get("training"), last.get("sampler")
    return TrainingRun(
        training_run_id=run.id,
        base_model=run.base_model,
        model_owner=run.project,
        is_lora=run.is_lora,
        corrupted=run.corrupted,
        lora_rank=run.lora_rank if run.is_lora else None,
        last_request_time=time_of(run.last_request),
        last_checkpoint=None if training is None else shown_checkpoint(training),
        last_sampler_checkpoint=None if sampler is None else shown_checkpoint(sampler),
        user_metadata=text_metadata(run.user_metadata),
    )
