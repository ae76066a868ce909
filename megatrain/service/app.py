"""The HTTP application: routes, and errors as answers."""

import json
import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from megatrain.errors import (
    BusyError,
    DeniedError,
    MegatrainError,
    NotFoundError,
    RankError,
    SamplerError,
)
from megatrain.service.auth.principal import Principal
from megatrain.service.console.router import make_router as make_console
from megatrain.service.headers import SecurityHeaders
from megatrain.service.hub import Hub
from megatrain.service.observe.collector import make_registry
from megatrain.service.observe.health import Health
from megatrain.service.observe.middleware import Observed
from megatrain.service.observe.note import about, current
from megatrain.service.observe.router import make_router as make_operation
from megatrain.service.observe.series import HttpSeries
from megatrain.service.observe.tracing import Tracing
from megatrain.service.openai.router import make_router
from megatrain.service.openai.served import Served
from megatrain.service.tinker import (
    billing,
    checkpoints,
    futures,
    rest,
    sampling,
    service,
    training,
)
from megatrain.service.tinker.access import address_of
from megatrain.service.wire.bodies import BodyError
from megatrain.service.wire.body_cap import BodyCap

logger = logging.getLogger(__name__)

PREFIX = "/api/v1"
MAX_TEXT_BYTES = 8 << 20
"""Of a body with texts, over a million tokens: it is parsed while others wait."""


def create_app(hub: Hub, tracing: Tracing | None = None) -> FastAPI:
    """Return the application of a hub; `tracing` makes a span of each request."""
    app = FastAPI(
        title="megatrain",
        version=version("megatrain"),
        description="Training of LoRA adapters for many tenants: the Tinker API.",
        docs_url=None,
        redoc_url=None,
    )
    app.state.hub = hub
    # What is asked most stands first: routes are tried one after the other.
    for part in (futures, training, sampling, service, rest, billing, checkpoints):
        app.include_router(part.router, prefix=PREFIX)
    authenticate, series = _authenticate_for(hub), HttpSeries()
    app.include_router(make_router(Served(hub), authenticate))
    app.include_router(make_operation(make_registry(hub, series), Health(hub), authenticate))
    app.include_router(make_console(hub))
    app.add_middleware(BodyCap, larger=_larger(hub))
    app.add_exception_handler(MegatrainError, _refuse)
    app.add_exception_handler(BodyError, _refuse_body)
    app.add_exception_handler(RequestValidationError, _refuse_fields)
    app.add_middleware(Observed, series=series, tracing=tracing, fail=_fail, prefix=PREFIX)
    app.add_middleware(SecurityHeaders)  # the outermost, so that all answers have them
    return app


def _authenticate_for(hub: Hub) -> Callable[[Request, str], Awaitable[Principal]]:
    async def authenticate(request: Request, scope: str) -> Principal:
        who = await hub.auth.authenticate(request.headers, scope, address_of(request))
        about(project=who.project)
        return who

    return authenticate


def _larger(hub: Hub) -> dict[str, int]:
    """Return the caps of endpoints whose bodies may be large, which they count themselves too."""
    most = hub.config.limits.max_body_bytes
    paths = dict.fromkeys(("/forward_backward", "/forward", "/asample"), most)
    return paths | {"/completions": min(most, MAX_TEXT_BYTES)}


def status_of(error: MegatrainError) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, NotFoundError):
        return 404
    if isinstance(error, DeniedError):
        return 403 if "scope" in error.message else 401
    if isinstance(error, BusyError):
        return 429
    if isinstance(error, RankError | SamplerError):
        return 503
    return 400


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MegatrainError)
    status = status_of(error)
    if status == 404 and not request.app.state.hub.is_ready:
        status = 503  # what an earlier process has left is not taken up yet
    headers = {}
    if isinstance(error, BusyError):
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(_said(str(error)), status, headers)


async def _refuse_fields(request: Request, error: Exception) -> Response:
    """Say what does not fit, without what was sent: it may be a secret, or no JSON."""
    assert isinstance(error, RequestValidationError)
    found = [{key: each[key] for key in ("type", "loc", "msg")} for each in error.errors()]
    # In ASCII, whatever the names of fields are.
    return Response(json.dumps({"detail": found}), 422, media_type="application/json")


async def _refuse_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BodyError)
    return JSONResponse(_said(str(error)), error.status)


def _fail(path: str, error: Exception) -> JSONResponse:
    logger.error("%s failed", path, exc_info=error)
    return JSONResponse(_said("the server failed; its log says why"), 500)


def _said(detail: str) -> dict[str, str]:
    """Return the body of an error: with what its lines in the log are found by."""
    note = current()
    return {"detail": detail} | ({} if note is None else {"x_request_id": note.request})
