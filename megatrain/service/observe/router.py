"""/metrics for Prometheus, /healthz and /readyz for whoever starts and watches processes."""

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatrain.service.observe.health import Health

SCOPE = "metrics"
"""Of keys that may read metrics, besides `admin`."""
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
"""Headers of requests that came through a proxy: they are not from this host."""

Authenticate = Callable[[Request, str], Awaitable[Any]]


def make_router(
    registry: CollectorRegistry, health: Health, authenticate: Authenticate
) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["operation"])

    @router.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Return all metrics: to this host, or for a key with the scope `metrics`."""
        if not is_local(request):
            await authenticate(request, SCOPE)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Tell that the process answers."""
        return {"status": "ok"}

    @router.get("/readyz", response_model=None)
    async def readyz(request: Request) -> JSONResponse:
        """Tell whether work is accepted; 503 where it is not, to this host with the reasons."""
        reasons = await health.reasons()
        said: dict[str, Any] = {"status": "not ready" if reasons else "ready"}
        if is_local(request):
            said["reasons"] = reasons
        return JSONResponse(said, 503 if reasons else 200)

    return router


def is_local(request: Request) -> bool:
    """Tell whether a request is from this host, by one of this host's own names.

    A page in a browser here may give its own name this address, and a proxy here speaks for others.
    """
    client = "" if request.client is None else request.client.host
    through = any(name in request.headers for name in FORWARDED)
    return not through and _is_loopback(client) and _is_loopback(request.url.hostname or "")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
