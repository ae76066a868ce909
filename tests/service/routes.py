"""Every route of the service, with requests for the objects of one project.

A request is made twice: by somebody else, who must get `stranger`, and by the owner, who must get
`owner`: so what is refused is refused for whose it is.  A new route needs an entry in ROUTES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import jsonschema
from fastapi.routing import iter_route_contexts

from megatrain.config.service import ServiceConfig
from megatrain.service.app import create_app
from megatrain.service.hub import Hub
from tests.service.owned import (
    DONE,
    PROTOBUF,
    SEQ,
    Owned,
    as_json,
    protobuf,
    sample,
)
from tests.service.server import NAME


@dataclass
class Case:
    """One request: what it is, and what becomes of it."""

    make: Callable[[Owned, Owned], dict[str, Any]] = lambda owner, asker: {}
    """Path values (`path`), and httpx's `json`, `params`, `content`, `headers`."""
    stranger: int = 404
    owner: int = 200
    """Status for each of them."""


@dataclass
class Route:
    """How a route is to be called; without a scope, anybody may."""

    scope: str | None
    cases: tuple[Case, ...]


def read(*cases: Case) -> Route:
    """Return a route for every key."""
    return Route("read", cases)


def lists(**request: Any) -> Route:
    """Return a route that names no object: it lists the caller's own."""
    return read(Case(lambda owner, asker: request, 200))


def anybody(**request: Any) -> Route:
    """Return a route without secrets, which asks for no key."""
    return Route(None, (Case(lambda owner, asker: request, 200),))


def train(*bodies: Callable[[Owned, Owned], dict[str, Any]], **statuses: int) -> Route:
    """Return a route of trainers with JSON bodies."""
    return Route("train", tuple(_json(body, **statuses) for body in bodies))


def _json(body: Callable[[Owned, Owned], dict[str, Any]], **statuses: int) -> Case:
    return Case(lambda owner, asker: {"json": body(owner, asker)}, **statuses)


def of_run(owner: Owned, asker: Owned) -> dict[str, Any]:
    """Return path values: a run."""
    return {"path": {"run_id": owner.run}}


def of_session(owner: Owned, asker: Owned) -> dict[str, Any]:
    """Return path values: a session."""
    return {"path": {"session_id": owner.session}}


def of_checkpoint(path: str, **more: Any) -> dict[str, Any]:
    """Return path values: a checkpoint."""
    run, _, name = path.removeprefix("tinker://").partition("/")
    return {"path": {"run_id": run, "checkpoint_id": name}, **more}


def _hours() -> dict[str, str]:
    """Return the day that ends with this hour."""
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    start, end = now - timedelta(hours=23), now + timedelta(hours=1)
    return {"starting_on": start.isoformat(), "ending_before": end.isoformat()}


_V1 = "/api/v1"
_ONE = f"{_V1}/training_runs/{{run_id}}/checkpoints/{{checkpoint_id:path}}"


def _openai(prefix: str) -> dict[str, Route]:
    """Return OpenAI's routes."""
    completion = {"prompt": "x", "max_tokens": 1}
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    return {
        f"GET {prefix}/models": Route("sample", (Case(stranger=200),)),
        f"GET {prefix}/models/{{model:path}}": Route(
            "sample",
            (
                Case(lambda o, a: {"path": {"model": NAME}}, 200),
                Case(lambda o, a: {"path": {"model": f"{o.run}/latest"}}),
            ),
        ),
        f"POST {prefix}/completions": Route(
            "sample",
            (
                _json(lambda o, a: completion | {"model": o.weights}),
                _json(lambda o, a: completion | {"model": f"{NAME};{o.weights}"}),
                _json(lambda o, a: completion | {"model": f"{o.run}/latest"}),
                _json(lambda o, a: completion | {"model": o.run}),
            ),
        ),
        f"POST {prefix}/chat/completions": Route(
            "sample",
            (
                _json(lambda o, a: chat | {"model": o.weights}),
                _json(lambda o, a: chat | {"model": f"{o.run}/latest"}),
            ),
        ),
    }


ROUTES: dict[str, Route] = {
    "GET /openapi.json": anybody(),
    f"GET {_V1}/healthz": anybody(),
    f"POST {_V1}/client/config": anybody(json={}),
    f"POST {_V1}/client/dynamic_config": anybody(json={}),
    f"GET {_V1}/get_server_capabilities": lists(),
    f"POST {_V1}/create_session": lists(json={}),
    f"POST {_V1}/session_heartbeat": read(
        _json(lambda o, a: {"session_id": o.session}, stranger=410)
    ),
    f"POST {_V1}/sessions/search": lists(json={}),
    f"GET {_V1}/sessions": lists(),
    f"GET {_V1}/sessions/{{session_id}}": read(Case(of_session)),
    f"PUT {_V1}/sessions/{{session_id}}/project": Route(
        "train",
        (Case(lambda o, a: of_session(o, a) | {"json": {"project_id": "owner"}}),),
    ),
    f"GET {_V1}/sessions/{{session_id}}/trace_export": read(Case(of_session)),
    f"POST {_V1}/telemetry": lists(json={}),
    f"GET {_V1}/auth/apikey/me": lists(),
    f"POST {_V1}/create_model": train(
        lambda o, a: {
            "session_id": o.session,
            "model_seq_id": 5,
            "base_model": NAME,
            "lora_config": {"rank": 2},
        }
    ),
    f"POST {_V1}/get_info": read(_json(lambda o, a: {"model_id": o.run})),
    f"POST {_V1}/forward_backward": Route(
        "train",
        (
            Case(lambda o, a: {"content": protobuf(o.run, SEQ), "headers": PROTOBUF}),
            _json(lambda o, a: as_json(o.run, SEQ + 1)),
        ),
    ),
    f"POST {_V1}/forward": train(lambda o, a: as_json(o.run, SEQ + 2, "forward_input")),
    f"POST {_V1}/optim_step": train(
        lambda o, a: {"model_id": o.run, "seq_id": SEQ + 3, "adam_params": {}},
        lambda o, a: {"model_id": o.run, "seq_id": DONE, "adam_params": {}},
        lambda o, a: {"model_id": o.run, "adam_params": {}},
    ),
    f"POST {_V1}/save_weights": train(
        lambda o, a: {"model_id": o.run, "path": "stolen", "seq_id": SEQ + 5}
    ),
    f"POST {_V1}/save_weights_external": train(
        lambda o, a: {"model_id": o.run, "path": "stolen", "seq_id": SEQ + 6}
    ),
    f"POST {_V1}/save_weights_for_sampler": train(
        lambda o, a: {"model_id": o.run, "path": "stolen", "seq_id": SEQ + 7},
        lambda o, a: {"model_id": o.run, "sampling_session_seq_id": 7, "seq_id": SEQ + 8},
    ),
    f"POST {_V1}/load_weights": train(
        lambda o, a: {"model_id": o.run, "path": o.state, "seq_id": SEQ + 9},
        lambda o, a: {"session_id": a.session, "model_seq_id": 6, "path": o.state},
        lambda o, a: {
            "session_id": a.session,
            "model_seq_id": 7,
            "path": o.state,
            "optimizer": True,
        },
        lambda o, a: {"session_id": o.session, "model_seq_id": 8, "path": a.state},
    ),
    f"POST {_V1}/create_custom_loss": train(
        lambda o, a: {"session_id": o.session, "name": "x"}, owner=404
    ),
    f"POST {_V1}/retrieve_future": read(
        _json(lambda o, a: {"request_id": o.request}, stranger=410)
    ),
    f"POST {_V1}/retrieve_futures": read(
        _json(
            lambda o, a: {
                "target": {"type": "sampling_session", "sampling_session_id": o.sampler},
                "timeout": 0,
            }
        )
    ),
    f"POST {_V1}/cancel_future": read(_json(lambda o, a: {"request_id": o.request})),
    f"POST {_V1}/create_sampling_session": Route(
        "sample",
        (
            _json(
                lambda o, a: {
                    "session_id": o.session,
                    "sampling_session_seq_id": 60,
                    "base_model": NAME,
                }
            ),
            _json(
                lambda o, a: {
                    "session_id": a.session,
                    "sampling_session_seq_id": 61,
                    "model_path": o.weights,
                }
            ),
        ),
    ),
    f"GET {_V1}/samplers/{{sampler_id}}": read(
        Case(lambda o, a: {"path": {"sampler_id": o.sampler}})
    ),
    f"POST {_V1}/join_sampling_session": Route(
        "sample", (_json(lambda o, a: {"sampling_session_id": o.sampler}),)
    ),
    f"POST {_V1}/asample": Route("sample", (_json(lambda o, a: sample(o.sampler)),)),
    f"GET {_V1}/training_runs": lists(),
    f"GET {_V1}/training_runs/{{run_id}}": read(Case(of_run)),
    f"GET {_V1}/training_runs/{{run_id}}/checkpoints": read(Case(of_run)),
    f"GET {_V1}/checkpoints": lists(),
    f"POST {_V1}/weights_info": read(_json(lambda o, a: {"tinker_path": o.state})),
    f"GET {_V1}/audit": Route("admin", (Case(stranger=200),)),
    f"GET {_V1}/billing/usage/checkpoints/current": lists(),
    f"GET {_V1}/billing/usage/events": lists(params=_hours()),
    f"GET {_V1}/files/{{ticket}}": Route(
        None, (Case(lambda o, a: {"path": {"ticket": o.ticket}}, 200),)
    ),
    f"GET {_ONE}/external_weights_urls": read(Case(lambda o, a: of_checkpoint(o.state))),
    f"POST {_V1}/copy_weights": train(
        lambda o, a: {"source_path": o.state, "session_id": a.session, "model_seq_id": 9},
        lambda o, a: {"source_path": o.state, "destination_project_id": "owner"},
        lambda o, a: {"source_path": a.state, "session_id": o.session, "model_seq_id": 10},
    ),
    f"PUT {_ONE}/ttl": Route(
        "train", (Case(lambda o, a: of_checkpoint(o.state, json={"ttl_seconds": 7200})),)
    ),
    f"POST {_ONE}/publish": Route("train", (Case(lambda o, a: of_checkpoint(o.state), owner=204),)),
    f"DELETE {_ONE}/publish": Route(
        "train", (Case(lambda o, a: of_checkpoint(o.state), owner=204),)
    ),
    **_openai("/v1"),
    **_openai("/oai/api/v1"),
    "GET /": anybody(),
    "GET /console/assets/{name}": anybody(path={"name": "main.js"}),
    "GET /api/console": anybody(),
    "GET /api/console/state": lists(),
    "GET /api/console/runs/{run_id}": read(Case(of_run)),
    "POST /api/console/runs/{run_id}/points": Route(
        "train",
        (
            Case(
                lambda o, a: of_run(o, a) | {"json": {"step": 1, "values": {"reward": 1.0}}},
                owner=204,
            ),
        ),
    ),
    "GET /api/console/archive": read(Case(lambda o, a: {"params": {"path": o.state}})),
    "GET /api/console/archive/{ticket}": Route(
        # A ticket is of one file, or of all: who has one of the first kind has not the other.
        None,
        (Case(lambda o, a: {"path": {"ticket": o.ticket}}, 404, 404),),
    ),
    "GET /metrics": anybody(),
    "GET /healthz": anybody(),
    "GET /readyz": anybody(),
    # What takes things away is last, so that an owner finds them until then.
    f"POST {_V1}/unload_model": train(lambda o, a: {"model_id": o.run}),
    f"DELETE {_ONE}": Route("train", (Case(lambda o, a: of_checkpoint(o.state), owner=204),)),
    f"POST {_V1}/sessions/{{session_id}}/finish": read(
        Case(lambda o, a: of_session(o, a) | {"json": {}}, 204, 204)
    ),
}


def routes_of_the_service() -> list[str]:
    """Return all routes, as ROUTES names them, that the application has."""
    config = ServiceConfig(models=({"name": NAME, "path": "nowhere"},))
    return [
        f"{method} {route.path}"
        for route in iter_route_contexts(create_app(Hub(config)).routes)
        for method in sorted(route.methods or ())
        if method != "HEAD"
    ]


def place(name: str, request: dict[str, Any]) -> tuple[str, str]:
    """Return method and path of a request of a route."""
    method, template = name.split(" ", 1)
    return method, template.replace(":path}", "}").format(**request.get("path", {}))


def call(http: httpx.Client, name: str, request: dict[str, Any]) -> httpx.Response:
    """Make a request of a route."""
    more = {key: value for key, value in request.items() if key != "path"}
    return http.request(*place(name, request), **more)


def check_documented(document: dict[str, Any], name: str, answer: httpx.Response) -> bool:
    """Check a JSON answer by the schema that the OpenAPI document has; return whether it has."""
    method, template = name.split(" ", 1)
    path = document["paths"].get(template.replace(":path}", "}"), {})
    responses = path.get(method.lower(), {}).get("responses", {})
    content = responses.get(str(answer.status_code), {}).get("content", {})
    schema = content.get("application/json", {}).get("schema")
    if not schema or "json" not in answer.headers.get("content-type", ""):
        return False
    jsonschema.validate(answer.json(), {**schema, "components": document["components"]})
    return "$ref" in schema or "anyOf" in schema
