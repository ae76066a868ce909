"""What the page shows, as plain data: one row of each kind of thing."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatrain.bus.beat import Beat
from megatrain.sampler.types import SamplerStatus
from megatrain.service.publish.versions import Version
from megatrain.service.store.records import Checkpoint, Run, Session
from megatrain.service.tinker.shown import checkpoint_id
from megatrain.service.work.run_state import RunState

Json = dict[str, Any]

ROUNDED_BYTES = 1 << 24
"""Memory is told in such steps, so that a service where nothing happens looks the same twice."""
_NAMES = ("name", "run_name", "display_name")
"""Where clients leave a name for people, in their metadata."""


def finite(value: float | None) -> float | None:
    """Return a number that JSON has, or None."""
    return value if value is not None and math.isfinite(value) else None


def run_row(
    run: Run,
    state: RunState | None,
    live: Version | None,
    session: Session | None,
    loss: float | None,
) -> Json:
    """Return a run; `state` is None for one that is on no ranks, `live` for one that is not live,
    `loss` of its last step."""
    return {
        "id": run.id,
        "label": label(run, session),
        "base_model": run.base_model,
        "rank": run.lora_rank if run.is_lora else None,
        "optimizer": run.optimizer.get("type", ""),
        "created": run.created,
        "last_request": run.last_request,
        "state": run.state,
        "step": run.step if state is None else state.step,
        "waiting": 0 if state is None else len(state.queue),
        "running": 0 if state is None else len(state.in_flight),
        "live_step": None if live is None else live.step,
        "loss": finite(loss),
        "error": "" if state is None else said(state.last_error),
        "metadata": {str(key): str(value) for key, value in run.user_metadata.items()},
        "session": run.session,
        "source": run.source,
        "corrupted": run.corrupted,
    }


def label(run: Run, session: Session | None) -> str:
    """Return what people call a run: its own name, or its session's or a short id with a number."""
    if own := _name_in(run.user_metadata):
        return own
    head, _, tail = run.id.partition(":")
    of = "" if session is None else session.display_name or _name_in(session.user_metadata)
    number = tail.rpartition(":")[2]
    return f"{of or head[:8]} · {number}" if number else of or head[:8]


def _name_in(metadata: Mapping[str, Any]) -> str:
    return next((str(metadata[name]) for name in _NAMES if metadata.get(name)), "")


def said(error: str) -> str:
    """Return an error as one line: results carry theirs as JSON."""
    try:
        told = json.loads(error)
    except ValueError:
        return error
    return str(told.get("error", error)) if isinstance(told, dict) else error


def checkpoint_row(record: Checkpoint) -> Json:
    """Return a checkpoint."""
    return {
        "path": record.path,
        "id": checkpoint_id(record),
        "run": record.run,
        "name": record.name,
        "kind": record.kind,
        "step": record.step,
        "size_bytes": record.size_bytes,
        "created": record.created,
        "expires": record.expires,
        "public": record.public,
        "base_model": record.base_model,
    }


def rank_rows(beats: Iterable[Beat], num_ranks: int, *, with_hosts: bool) -> list[Json]:
    """Return each rank's last sign of life; hosts are for who runs the service."""
    heard = {beat.rank: beat for beat in beats}
    last = max(num_ranks, 1 + max(heard, default=-1))
    return [_rank(rank, heard.get(rank), with_hosts) for rank in range(last)]


def _rank(rank: int, beat: Beat | None, with_hosts: bool) -> Json:
    if beat is None:
        return {"rank": rank, "state": "silent"}
    state = "failed" if beat.failed else "busy" if beat.command else "idle"
    row: Json = {
        "rank": rank,
        "state": state,
        "phase": beat.phase if state == "busy" else "",
        "command": beat.command,
        "running_s": int(beat.running_s) if state == "busy" else 0,
        "resident_bytes": beat.resident_bytes // ROUNDED_BYTES * ROUNDED_BYTES,
        "tokens": beat.tokens,
    }
    return row | ({"host": beat.host} if with_hosts else {})


def sampler_row(status: SamplerStatus) -> Json:
    """Return how an engine is; of its adapters, which may be anybody's, only how many."""
    return {
        "engine": status.engine,
        "ready": status.ready,
        "adapters": len(status.adapters),
        "running": status.running,
        "waiting": status.waiting,
        "restarts": status.restarts,
        "error": status.error,
    }


def version_rows(
    versions: Iterable[Version], live: Iterable[Version], is_own: Callable[[str], bool]
) -> list[Json]:
    """Return the versions of what `is_own`: the newest first."""
    newest = {version.name for version in live}
    rows = [
        {
            "name": version.name,
            "source": version.source,
            "step": version.step,
            "users": version.users,
            "state": _state_of(version, newest),
        }
        for version in versions
        if is_own(version.source)
    ]
    return rows[::-1]


def _state_of(version: Version, live: set[str]) -> str:
    if version.retired:
        return "draining"
    if version.name in live:
        return "live"
    return "kept" if version.is_owned else "saved"


def mismatch_rows(
    figures: Iterable[Mapping[str, Any]], is_own: Callable[[str], bool], most: int
) -> list[Json]:
    """Return how far sampler and trainer are apart for the `most` newest versions of `is_own`."""
    names = ("version", "source", "step", "tokens", "when")
    rows = [
        {name: each[name] for name in names}
        | {name: finite(each[name]) for name in ("mean", "max", "k3")}
        for each in figures
        if is_own(each["source"])
    ]
    return rows[::-1][:most]
