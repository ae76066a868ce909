"""What is seen of every HTTP request: its id, its time, its span, and a line in the log."""

import logging
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatrain.service.observe.note import Note, serving
from megatrain.service.observe.series import HttpSeries
from megatrain.service.observe.tracing import Span, Tracing

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_ALLOWED = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
"""Of an id that a client gave; others are replaced, since they stand in logs and headers."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
READY = "/readyz"
"""Asked every few seconds; 503 is an answer there."""
NO_RESULT_YET = 408
"""What a poll is told whose result is not there yet: no failure."""


Fail = Callable[[str, Exception], ASGIApp]


class Observed:
    """ASGI middleware around all that may fail: what it sets holds for errors too."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        series: HttpSeries,
        tracing: Tracing | None,
        fail: Fail,
        prefix: str = "",
    ) -> None:
        """`fail` makes an answer of what nobody has caught, and logs it; `prefix` is what stands
        before the paths of some routes."""
        self._app, self._series, self._tracing, self._fail = app, series, tracing, fail
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, headers = time.perf_counter(), Headers(scope=scope)
        note = Note(spans=self._tracing)
        if _ALLOWED.fullmatch(given := headers.get(REQUEST_ID, "")):
            note.request = given
        status, seconds = 500, 0.0

        async def marked(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                status, seconds = message["status"], time.perf_counter() - began
                MutableHeaders(scope=message)[REQUEST_ID] = note.request
            await send(message)

        with serving(note), _span(self._tracing, note, headers, scope) as span:
            try:
                await self._app(scope, receive, marked)
            except Exception as error:  # whatever it is, it is answered with headers and an id
                answer = self._fail(scope["path"], error)
                if seconds:  # the answer has begun: it can only be broken off
                    raise
                await answer(scope, receive, marked)
            finally:
                endpoint, method = endpoint_of(scope, self._prefix), method_of(scope)
                self._series.answered(endpoint, method, status, seconds)
                if span is not None:
                    span.end(f"{method} {endpoint}", status)
                _say(method, scope["path"], status, seconds)


def endpoint_of(scope: Scope, prefix: str) -> str:
    """Return the path of the route that a request went to: `/api/v1/sessions/{session_id}`."""
    path = getattr(scope.get("route"), "path", None)
    if path is None:
        return "other"
    is_below = scope["path"].startswith(f"{prefix}/") and not path.startswith(f"{prefix}/")
    return f"{prefix}{path}" if is_below else str(path)


def method_of(scope: Scope) -> str:
    """Return a request's method; what is none of the usual ones is `other`."""
    return scope["method"] if scope["method"] in _METHODS else "other"


def _say(method: str, path: str, status: int, seconds: float) -> None:
    is_failure = status >= 400 and status != NO_RESULT_YET and path != READY
    level = logging.INFO if is_failure else logging.DEBUG
    if logger.isEnabledFor(level):
        fields = {"method": method, "path": path[:200], "status": status}
        logger.log(
            level,
            "%s %s: %d",
            *(method, path[:200], status),
            extra={"fields": fields | {"seconds": round(seconds, 6)}},
        )


def _span(
    tracing: Tracing | None, note: Note, headers: Headers, scope: Scope
) -> AbstractContextManager[Span | None]:
    if tracing is None:
        return nullcontext()
    return tracing.serving(note, headers, str(scope["method"]))
