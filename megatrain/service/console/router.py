"""Routes of the page: its files, what it shows, and what only it needs."""

import json
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from megatrain.errors import NotFoundError
from megatrain.service.console.archive import ARCHIVE, pieces_of, size_of
from megatrain.service.console.assets import PAGE, asset, etag_of
from megatrain.service.console.curves import (
    MAX_NAMES,
    MAX_POINTS,
    PointsBody,
    columns,
    points_of,
)
from megatrain.service.console.overview import Overview
from megatrain.service.console.view import Json
from megatrain.service.hub import Hub
from megatrain.service.store import checkpoints, points, runs
from megatrain.service.tinker.access import Reader, TheHub, Trainer
from megatrain.service.work.operations import CURVES

RunId = Annotated[str, Path(max_length=128)]
Count = Annotated[int, Query(ge=1, le=1000)]


def make_router(hub: Hub) -> APIRouter:
    """Return the page's routes; all but its files ask for a key."""
    router = APIRouter(tags=["console"])
    overview = Overview(hub)
    router.get("/", include_in_schema=False)(page)
    router.get("/console/assets/{name}", include_in_schema=False)(file)
    router.get("/api/console")(about)

    @router.get("/api/console/state", response_model=None)
    async def state(
        request: Request, who: Reader, num_runs: Count = 50, num_checkpoints: Count = 100
    ) -> Response:
        """Return all that the page shows; 304 for who has seen it."""
        return _answer(request, await overview.of(who, num_runs, num_checkpoints))

    router.get("/api/console/runs/{run_id}", response_model=None)(curves)
    router.post("/api/console/runs/{run_id}/points", status_code=204)(add_points)
    router.get("/api/console/archive")(archive_ticket)
    router.get("/api/console/archive/{ticket}", response_model=None)(archive)
    return router


def _answer(request: Request, said: Json) -> Response:
    data = json.dumps(said, separators=(",", ":"), allow_nan=False).encode()
    return _cached(request, data, "application/json", etag_of(data), "no-store")


def _cached(
    request: Request, data: bytes, media_type: str, etag: str, control: str = "no-cache"
) -> Response:
    headers = {"etag": etag, "cache-control": control}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers)


async def page(request: Request) -> Response:
    """Return the page."""
    return await file(PAGE, request)


async def file(name: str, request: Request) -> Response:
    """Return one of the page's files."""
    found = asset(name)
    return _cached(request, found.data, found.media_type, found.etag)


async def about(hub: TheHub) -> Json:
    """Tell whether the page has to ask for a key."""
    return {"keys": hub.config.keys}


async def curves(
    run_id: RunId,
    request: Request,
    hub: TheHub,
    who: Reader,
    since: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0.0,
) -> Response:
    """Return a run's curves, or what was added to them after an answer's `until`."""
    await _own(hub, who.project, run_id)
    found = await hub.store.read(points.of_run(run_id, since=since))
    said = columns(found)
    return _answer(request, said | {"until": max(said["until"], since)})


async def add_points(run_id: RunId, body: PointsBody, hub: TheHub, who: Trainer) -> Response:
    """Add values of a step, such as its mean reward, to a run's curves."""
    await _own(hub, who.project, run_id)
    new = points_of(run_id, body)
    await hub.store.write(
        points.add_within(new, own=CURVES, max_names=MAX_NAMES, max_points=MAX_POINTS)
    )
    return Response(status_code=204)


async def _own(hub: Hub, project: str, run_id: str) -> None:
    if await hub.store.read(runs.get(project, run_id)) is None:
        raise NotFoundError(f"there is no training run {run_id!r}")


async def archive_ticket(
    path: Annotated[str, Query(max_length=400)], hub: TheHub, who: Reader
) -> Json:
    """Return where a checkpoint's files can be downloaded as one tar, without a key for an hour."""
    record = await hub.store.read(checkpoints.get(who.project, path))
    if record is None:
        raise NotFoundError(f"there is no checkpoint {path!r}")
    await hub.files.manifest(record.location)
    ticket, ends = hub.signer.sign(record.location, ARCHIVE)
    return {"url": f"api/console/archive/{ticket}", "expires": ends}


async def archive(ticket: Annotated[str, Path(max_length=2000)], hub: TheHub) -> Response:
    """Return the tar that was signed for."""
    key, name = hub.signer.check(ticket)
    if name != ARCHIVE:
        raise NotFoundError("this URL is of one file, and not of a whole checkpoint")
    manifest = await hub.files.manifest(key)
    headers = {
        "content-length": str(size_of(manifest)),
        "content-disposition": f'attachment; filename="{key.replace("/", "_")}.tar"',
    }
    return StreamingResponse(
        pieces_of(hub.files, key, manifest), media_type="application/x-tar", headers=headers
    )
