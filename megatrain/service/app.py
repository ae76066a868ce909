"""The HTTP application: routes, and errors as answers."""

import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

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
from megatrain.service.openai.router import make_router
from megatrain.service.openai.served import Served
from megatrain.service.tinker import checkpoints, futures, rest, sampling, service, training
from megatrain.service.wire.bodies import BodyError
from megatrain.service.wire.body_cap import BodyCap

logger = logging.getLogger(__name__)

PREFIX = "/api/v1"


def create_app(hub: Hub) -> FastAPI:
    """Return the application of a hub."""
    app = FastAPI(
        title="megatrain",
        version=version("megatrain"),
        description="Training of LoRA adapters for many tenants: the Tinker API.",
        docs_url=None,
        redoc_url=None,
    )
    app.state.hub = hub
    for part in (service, training, futures, sampling, rest, checkpoints):
        app.include_router(part.router, prefix=PREFIX)
    app.include_router(make_router(Served(hub), _authenticate_for(hub)))
    app.include_router(make_console(hub))
    app.add_middleware(BodyCap, larger=_larger(hub))
    app.add_exception_handler(MegatrainError, _refuse)
    app.add_exception_handler(BodyError, _refuse_body)
    app.add_exception_handler(Exception, _fail)
    app.add_middleware(SecurityHeaders)  # the outermost, so that all answers have them
    return app


def _authenticate_for(hub: Hub) -> Callable[[Request, str], Awaitable[Principal]]:
    async def authenticate(request: Request, scope: str) -> Principal:
        return await hub.auth.authenticate(request.headers, scope)

    return authenticate


def _larger(hub: Hub) -> dict[str, int]:
    """Return the caps of endpoints whose bodies may be large, which they count themselves too."""
    paths = ("/forward_backward", "/forward", "/asample", "/completions")
    return dict.fromkeys(paths, hub.config.limits.max_body_bytes)


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
    headers = {}
    if isinstance(error, BusyError):
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"detail": str(error)}, status, headers)


async def _refuse_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BodyError)
    return JSONResponse({"detail": str(error)}, error.status)


async def _fail(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse({"detail": "the server failed; its log says why"}, 500)
