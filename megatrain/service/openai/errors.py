"""Errors in OpenAI's shape."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatrain.errors import (
    BusError,
    BusyError,
    DeniedError,
    MegatrainError,
    NotFoundError,
    SamplerError,
)

Json = dict[str, Any]


def described(error: MegatrainError) -> tuple[int, Json]:
    """Return the HTTP status and the body of an error."""
    status, kind, code = _kind(error)
    return status, _body(str(error), kind, code=code)


def _kind(error: MegatrainError) -> tuple[int, str, str | None]:
    if isinstance(error, NotFoundError):
        return 404, "invalid_request_error", "model_not_found"
    if isinstance(error, DeniedError):
        if "scope" in error.message:
            return 403, "permission_error", None
        return 401, "authentication_error", "invalid_api_key"
    if isinstance(error, BusyError):
        return 429, "rate_limit_error", "rate_limit_exceeded"
    if isinstance(error, BusError | SamplerError):
        return 503, "server_error", None
    return 400, "invalid_request_error", None


def _body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class OpenAIRoute(APIRoute):
    """A route whose errors are told as OpenAI tells them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with errors as answers."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return JSONResponse(_invalid(error), 400)
            except MegatrainError as error:
                return _answer(error)

        return handled


def _answer(error: MegatrainError) -> JSONResponse:
    status, body = described(error)
    headers = {}
    if isinstance(error, BusyError):
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)


def _invalid(error: RequestValidationError) -> Json:
    """Name the first option that will not do; its value is not repeated."""
    first = error.errors()[0]
    place = [str(each) for each in first["loc"] if each != "body"]
    param = place[0] if place else None
    if first["type"] == "extra_forbidden":
        message = f"the option {'.'.join(place)!r} is not supported here; leave it out"
    else:
        message = f"{'.'.join(place) or 'the body'}: {first['msg']}"
    return _body(message, "invalid_request_error", param=param)
