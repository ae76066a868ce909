"""OpenTelemetry spans: an HTTP request, what it asked for, its queue, its pass, the ranks.

Switched on by OpenTelemetry's own variables: OTEL_EXPORTER_OTLP_ENDPOINT, or OTEL_TRACES_EXPORTER
(`otlp`, `console`).  A request's traceparent (W3C) is its span's parent.  Nothing is imported
unless it is switched on.
"""

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any, Protocol

from megatrain.errors import ConfigError
from megatrain.service.observe.note import Note, Traced

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
OTLP = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
HINT = "pip install 'megatrain[otel]', or unset {}"


class Span(Protocol):
    """A request's span while it is open."""

    def end(self, name: str, status: int) -> None:
        """Give it its name, and end it."""


class Tracing:
    """Makes spans, and sends them with a provider of its own."""

    def __init__(self, provider: Any) -> None:
        """`provider` is a TracerProvider of OpenTelemetry's SDK."""
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - an extra
            TraceContextTextMapPropagator,
        )

        self._provider = provider
        self._tracer = provider.get_tracer("megatrain.service", version("megatrain"))
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def serving(self, note: Note, headers: Mapping[str, str], method: str) -> Iterator[Span]:
        """Open the span of an HTTP request, and note it."""
        from opentelemetry import trace  # noqa: PLC0415

        parent = self._propagator.extract(dict(headers))
        span = self._tracer.start_span(method, parent, trace.SpanKind.SERVER)
        context, told = trace.set_span_in_context(span, parent), span.get_span_context()
        note.context = context
        note.trace_id = trace.format_trace_id(told.trace_id)
        note.span_id = trace.format_span_id(told.span_id)
        span.set_attribute("megatrain.request", note.request)
        try:
            yield _Open(span, note, method)
        finally:
            if span.is_recording():
                span.end()

    def request(self, ticket: Traced, context: Any, *, failed: bool) -> None:
        """Make the spans of a request that is over, from the times that were noted."""
        from opentelemetry import trace  # noqa: PLC0415

        now, clock = time.time(), time.monotonic()

        def at(monotonic: float) -> int:
            return int((now - clock + monotonic) * 1e9)

        timing = ticket.timing
        attributes = {
            "megatrain.future": ticket.id,
            "megatrain.run": ticket.run or "",
            "megatrain.tokens": ticket.tokens,
            "megatrain.pass.requests": timing.members,
        }
        span = self._tracer.start_span(
            ticket.kind, context, attributes=attributes, start_time=at(timing.accepted)
        )
        if failed:
            span.set_status(trace.StatusCode.ERROR)
        inside, begin = trace.set_span_in_context(span, context), timing.accepted
        for name, seconds in timing.phases().items():
            phase = self._tracer.start_span(name, inside, start_time=at(begin))
            begin += seconds
            phase.end(at(begin))
        span.end(at(timing.ended))

    def close(self) -> None:
        """Send what was not sent."""
        self._provider.shutdown()


class _Open:
    def __init__(self, span: Any, note: Note, method: str) -> None:
        self._span, self._note, self._method = span, note, method

    def end(self, name: str, status: int) -> None:
        from opentelemetry.trace import StatusCode  # noqa: PLC0415

        self._span.update_name(name)
        self._span.set_attributes(
            {
                "http.request.method": self._method,
                "http.route": name.partition(" ")[2],
                "http.response.status_code": status,
                "megatrain.project": self._note.project,
                "megatrain.run": self._note.run,
            }
        )
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def make_tracing(environ: Mapping[str, str]) -> Tracing | None:
    """Return what makes spans, if the environment asks for it.

    Raises ConfigError for an exporter that is unknown, or whose package is not installed.
    """
    kind = exporter_asked_for(environ)
    if kind is None:
        return None
    variable = next((name for name in ENDPOINTS if environ.get(name)), "OTEL_TRACES_EXPORTER")
    try:
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        exporter = _exporter(kind)
    except ImportError as error:
        raise ConfigError(
            f"{variable} asks for traces, and a package for that is not installed: {error}",
            hint=HINT.format(variable),
        ) from error
    name = environ.get("OTEL_SERVICE_NAME") or "megatrain"
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def exporter_asked_for(environ: Mapping[str, str]) -> str | None:
    """Return `otlp`, `console`, or None for no traces.  Raises ConfigError for anything else."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    given = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    kind = given or ("otlp" if any(environ.get(name) for name in ENDPOINTS) else "none")
    if kind not in ("otlp", "console", "none"):
        raise ConfigError(
            f"OTEL_TRACES_EXPORTER={kind!r} is not known here", hint="otlp, console or none"
        )
    return None if kind == "none" else kind


def _exporter(kind: str) -> Any:
    if kind == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter  # noqa: PLC0415

        return ConsoleSpanExporter(out=sys.stdout)
    return importlib.import_module(OTLP).OTLPSpanExporter()
