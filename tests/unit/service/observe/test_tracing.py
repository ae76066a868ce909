"""Spans from HTTP to the ranks under the client's own, and what is said where they cannot be."""

import asyncio
import time
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.responses import JSONResponse

from megatrain.errors import ConfigError
from megatrain.service.observe.middleware import Observed
from megatrain.service.observe.note import current
from megatrain.service.observe.series import HttpSeries
from megatrain.service.observe.timing import Spent, Timing
from megatrain.service.observe.tracing import Tracing, exporter_asked_for, make_tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider)


def app_with(tracing: Tracing) -> FastAPI:
    app = FastAPI()

    @app.get("/things/{name}")
    async def work(name: str) -> dict[str, str]:
        note, now = current(), time.monotonic()
        timing = Timing(now - 4, now - 3, now - 2, now - 1, now, Spent(0.9, 0.5), members=2)
        ticket = SimpleNamespace(id="f", kind="forward_backward", run="r", tokens=7, timing=timing)
        note.spans.request(ticket, note.context, failed=name == "bad")
        return {"trace": note.trace_id}

    app.add_middleware(
        Observed,
        series=HttpSeries(),
        tracing=tracing,
        fail=lambda path, error: JSONResponse({}, 500),
    )
    return app


def ask(app: FastAPI, path: str, **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(send())


def test_a_request_is_a_tree_of_spans_under_the_clients_own(tracing, exporter):
    answer = ask(app_with(tracing), "/things/good", traceparent=f"00-{TRACE}-{PARENT}-01")
    assert answer.json() == {"trace": TRACE}
    spans = {span.name: span for span in exporter.get_finished_spans()}
    http, asked = spans.pop("GET /things/{name}"), spans.pop("forward_backward")
    assert f"{http.parent.span_id:016x}" == PARENT
    assert asked.parent.span_id == http.context.span_id
    assert list(spans) == ["commit", "queue", "submit", "bus", "ranks", "result"]
    assert {span.parent.span_id for span in spans.values()} == {asked.context.span_id}
    assert {f"{span.context.trace_id:032x}" for span in (http, asked)} == {TRACE}
    assert asked.attributes["megatrain.pass.requests"] == 2
    ranks = spans["ranks"]
    assert (ranks.end_time - ranks.start_time) / 1e9 == pytest.approx(0.5, abs=1e-3)
    assert http.attributes["http.response.status_code"] == 200


def test_a_failure_is_a_failure_in_its_span(tracing, exporter):
    ask(app_with(tracing), "/things/bad")
    failed = [s.name for s in exporter.get_finished_spans() if not s.status.is_ok]
    assert "forward_backward" in failed


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_opentelemetrys_variables_switch_it_on(environ, expected):
    assert exporter_asked_for(environ) == expected


def test_an_unknown_exporter_is_refused():
    with pytest.raises(ConfigError, match="zipkin"):
        make_tracing({"OTEL_TRACES_EXPORTER": "zipkin"})


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter", None)
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_ENDPOINT") as caught:
        make_tracing(environ)
    assert "megatrain[otel]" in str(caught.value.hint)


def test_spans_can_be_written_to_the_console(capsys):
    tracing = make_tracing({"OTEL_TRACES_EXPORTER": "console", "OTEL_SERVICE_NAME": "mine"})
    ask(app_with(tracing), "/things/good")
    tracing.close()
    said = capsys.readouterr().out
    assert '"service.name": "mine"' in said
    assert '"name": "forward_backward"' in said
