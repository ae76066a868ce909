"""What the OpenAI-compatible endpoints need of the service."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request

from megatrain.sampler.types import Piece, SampleRequest, SampleResult
from megatrain.service.auth.principal import Principal


@dataclass(frozen=True, slots=True)
class Model:
    """A model as `GET /v1/models` tells it."""

    id: str
    created: int
    """Seconds since 1970."""
    owned_by: str = "megatrain"


@dataclass(frozen=True, slots=True)
class Target:
    """What a request's `model` means."""

    name: str
    """As the client called it."""
    folder: Path
    """The base's checkpoint, with tokenizer and chat template."""
    max_context_length: int
    max_new_tokens: int
    """Most tokens of an answer, and what is asked for where a chat does not say."""
    at: Any = None
    """The service's own: which adapter, which deployment."""


class Completer(Protocol):
    """Who resolves names and draws tokens.  Errors are megatrain.errors."""

    async def models(self, who: Principal) -> Sequence[Model]:
        """Return what a project may sample: bases and its own adapters."""

    async def resolve(self, who: Principal, model: str) -> Target:
        """Return what a name means: base, `tinker://` path, run, `<run>/latest`, `<base>;<path>`.

        Raises NotFoundError, also for what is another project's.
        """

    async def sample(self, who: Principal, target: Target, request: SampleRequest) -> SampleResult:
        """Draw; `request.adapter` is set here.  Raises DataError, BusyError, SamplerError."""

    def stream(
        self, who: Principal, target: Target, request: SampleRequest
    ) -> AsyncIterator[Piece]:
        """Draw, and tell tokens while they come."""


Authenticate = Callable[[Request, str], Awaitable[Principal]]
"""Returns the caller, whose key must have a scope.  Raises DeniedError, BusyError."""
