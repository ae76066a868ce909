"""OpenTelemetry spans of commands, with one for each phase, and of recoveries.  No torch.

Spans go where the script has sent its own (opentelemetry.trace.set_tracer_provider).  A command is
a child of the span in which it was submitted.  Spans are made when a command is over, from times
that were taken before: a driver that dies leaves none half open.
"""

import importlib.util
import logging
from dataclasses import dataclass

from megatrain.bus.events import Event
from megatrain.bus.telemetry.phases import phases_of
from megatrain.bus.telemetry.watched import Watched, restarts_of
from megatrain.errors import PlatformError

HINT = "pip install 'megatrain[otel]'"

try:
    from opentelemetry import context as contexts
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace import (
        ProxyTracerProvider,
        SpanKind,
        Status,
        StatusCode,
        TracerProvider,
    )
except ImportError as error:
    raise PlatformError(
        "traces=True needs OpenTelemetry, which is not installed", hint=HINT
    ) from error

logger = logging.getLogger(__name__)

TEXT = 1000
"""Letters of an error that a span keeps."""


@dataclass(frozen=True, slots=True)
class _Accepted:
    """What is known of a command before it is over."""

    context: Context
    at: float
    num_bytes: int


class BusTraces:
    """Makes spans of a driver's events until it is closed."""

    def __init__(self, driver: Watched, tracer_provider: TracerProvider | None = None) -> None:
        """`tracer_provider` is the script's own, by set_tracer_provider, unless it is given.

        Raises PlatformError if there is none and the SDK that makes one is not installed.
        """
        if tracer_provider is None:
            _check_provider()
        self._driver = driver
        self._tracer = trace.get_tracer("megatrain.bus", tracer_provider=tracer_provider)
        self._accepted: dict[int, _Accepted] = {}
        self._lost = ""
        driver.observers.add(self._note)

    def close(self) -> None:
        """Make no more spans."""
        self._driver.observers.remove(self._note)
        self._accepted.clear()

    def _note(self, event: Event) -> None:
        match event.kind:
            case "accepted":
                # Told in the thread that submits: its span is the current one.
                context = contexts.get_current()
                self._accepted[event.seq] = _Accepted(context, event.at, event.num_bytes)
            case "done" | "failed" | "cancelled":
                self._end(event)
            case "lost":
                self._lost = event.text
            case "recovered":
                self._recovered(event)

    def _end(self, event: Event) -> None:
        begun = event.at - event.seconds
        # Commands that a driver before this one accepted were not seen to be accepted.
        accepted = self._accepted.pop(event.seq, None) or _Accepted(Context(), begun, 0)
        span = self._tracer.start_span(
            event.command,
            accepted.context,
            SpanKind.CLIENT,
            {
                "megatrain.seq": event.seq,
                "megatrain.outcome": event.kind,
                "megatrain.sent_bytes": accepted.num_bytes,
                "megatrain.received_bytes": event.num_bytes,
            },
            start_time=_nanoseconds(accepted.at),
        )
        if span.is_recording():
            if event.kind == "failed":
                span.set_status(Status(StatusCode.ERROR, event.text[:TEXT]))
            self._phases(event, trace.set_span_in_context(span, accepted.context), accepted.at)
        span.end(_nanoseconds(event.at))

    def _phases(self, event: Event, context: Context, at: float) -> None:
        for name, seconds in phases_of(event).items():
            span = self._tracer.start_span(name, context, start_time=_nanoseconds(at))
            at += seconds
            span.end(_nanoseconds(min(at, event.at)))

    def _recovered(self, event: Event) -> None:
        span = self._tracer.start_span(
            "recovered",
            Context(),
            attributes={
                "megatrain.lost": self._lost[:TEXT],
                "megatrain.restarts": restarts_of(self._driver),
            },
            start_time=_nanoseconds(event.at - event.seconds),
        )
        span.end(_nanoseconds(event.at))


def _check_provider() -> None:
    """Refuse, or say, that spans would go nowhere."""
    if not isinstance(trace.get_tracer_provider(), ProxyTracerProvider):
        return
    # The API alone comes with other packages, and makes spans that nobody records.
    if importlib.util.find_spec("opentelemetry.sdk") is None:
        raise PlatformError(
            "traces=True needs OpenTelemetry's SDK, which is not installed", hint=HINT
        )
    logger.info("spans go nowhere until opentelemetry.trace.set_tracer_provider is called")


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
