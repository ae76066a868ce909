"""Caps bodies of all endpoints, before a framework holds and parses them.

Endpoints that read large bodies do so by themselves (see bodies); here they only get a higher cap.
"""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BYTES = 1 << 20
"""Of a body where nothing else is said: JSON takes up to twenty times its size when parsed."""


class BodyCap:
    """ASGI middleware that answers 413 to bodies over their path's cap."""

    def __init__(
        self, app: ASGIApp, *, larger: Mapping[str, int], max_bytes: int = MAX_BYTES
    ) -> None:
        """`larger` has caps by the end of the path: {"/asample": 32 << 20}."""
        self._app, self._larger, self._max_bytes = app, dict(larger), max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._cap(scope["path"])
        if _announced(scope) > most:
            await JSONResponse({"detail": _said(most)}, 413)(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise HTTPException(413, _said(most))
            return message

        await self._app(scope, counted, send)

    def _cap(self, path: str) -> int:
        for end, cap in self._larger.items():
            if path.endswith(end):
                return cap
        return self._max_bytes


def _announced(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:18])
    return 0


def _said(most: int) -> str:
    return f"the body has more than {most} bytes"
