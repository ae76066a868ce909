"""Who asks, and of what: what every endpoint begins with."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, cast

from fastapi import Depends, Query, Request

from megatrain.service.auth.principal import Principal
from megatrain.service.hub import Hub
from megatrain.service.observe.note import about


def hub_of(request: Request) -> Hub:
    """Return the service."""
    return cast(Hub, request.app.state.hub)


def address_of(request: Request) -> str:
    """Return where a request came from."""
    return request.client.host if request.client is not None else ""


def needs(scope: str) -> Callable[[Request], Awaitable[Principal]]:
    """Return a dependency: the caller, whose key must have a scope."""

    async def principal(request: Request) -> Principal:
        address = address_of(request)
        who = await hub_of(request).auth.authenticate(request.headers, scope, address)
        about(project=who.project)
        return who

    return principal


TheHub = Annotated[Hub, Depends(hub_of)]
Reader = Annotated[Principal, Depends(needs("read"))]
Trainer = Annotated[Principal, Depends(needs("train"))]
Admin = Annotated[Principal, Depends(needs("admin"))]
Sampler = Annotated[Principal, Depends(needs("sample"))]

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=1 << 40)]

Json = dict[str, Any]

LARGE_BYTES = 1 << 16
"""A body from here on is parsed in a thread."""
