"""Hostile input: no answer is a server's error, none is late, memory stays, and training goes on.

By schemathesis over the OpenAPI document, and by damaged bodies of the official client.  `-m chaos`
tries fifty times as much.
"""

import asyncio
import contextlib
import itertools
import json
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from tinker import types

from megatrain.config.service import ServiceConfig
from megatrain.service.app import create_app
from megatrain.service.hub import Hub
from tests.fixtures.small_model import make_small_model
from tests.service import mutations, routes
from tests.service.clients import datum
from tests.service.configured import ConfiguredServer
from tests.service.owned import PROTOBUF, Owned, new_run, own, protobuf, result
from tests.service.routes import ROUTES
from tests.service.sdk_clients import client
from tests.service.server import NAME

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore::FutureWarning")]

V1, JSON = "/api/v1", {"content-type": "application/json"}
POLL_S, GAP_S = 1.0, 2.0
LATE_S = 30.0
"""Seconds in which every answer comes, on two processors that do other things too."""
GROWTH_MIB = 200
"""Growth of the service's memory that is no leak: results are kept up to 256 MiB, and the largest
body takes 64 MiB while it is read."""
AMOUNTS = [
    pytest.param(1, id="some"),
    pytest.param(50, id="many", marks=[pytest.mark.chaos, pytest.mark.timeout(3600)]),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    warnings.simplefilter("ignore")
    server = ConfiguredServer(
        make_small_model(tmp_path_factory.mktemp("model")),
        tmp_path_factory.mktemp("service"),
        served={"sampler": {"engine": "transformers", "max_batch": 8}},
        times={"poll_s": POLL_S, "gap_s": GAP_S},
        limits={"max_new_tokens": 8, "max_samples": 8},
    )
    server.start()
    yield server
    assert server.stop() == 0


def train(server: ConfiguredServer, key: str, steps: int = 3) -> list[float]:
    """Return the losses and norms of a run that depend on nothing but its seed."""
    service = client(server, key)
    training = service.create_lora_training_client(base_model=NAME, rank=2, seed=9).result()
    draw, found = random.Random(9), []
    for _ in range(steps):
        passed = training.forward_backward([datum(draw, 12)], "cross_entropy")
        moved = training.optim_step(types.AdamParams(learning_rate=1e-2))
        found += [passed.result().metrics["loss:sum"], moved.result().metrics["grad_norm"]]
    service.close("success").result()
    return found


class Honest:
    """Trains again and again under a project of its own, while others do what they do."""

    def __init__(self, server: ConfiguredServer, key: str, expected: list[float]) -> None:
        self._server, self._key, self.expected = server, key, expected
        self.found: list[list[float]] = []
        self.slowest_s = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Honest":
        self._rss = self._memory_mib()
        self._thread.start()
        return self

    def _work(self) -> None:
        while not self._is_over.is_set():
            began = time.monotonic()
            self.found.append(train(self._server, self._key))
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def _memory_mib(self) -> float:
        status = Path(f"/proc/{self._server.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join(2 * LATE_S)
        if error[0] is not None:
            return
        assert not self._thread.is_alive(), "an honest client waits for ever"
        assert self.found
        for losses in self.found:
            assert losses == pytest.approx(self.expected, rel=1e-4)
        assert self.slowest_s < LATE_S
        growth = self._memory_mib() - self._rss
        print(f"memory grew by {growth:.0f} MiB; the slowest run took {self.slowest_s:.1f} s")
        assert growth < GROWTH_MIB


@pytest.fixture(scope="module")
def undisturbed(server) -> tuple[str, list[float]]:
    """A key of a project of its own, and what its training gives while nobody else is there."""
    key = server.create_key("--project", "honest")
    return key, train(server, key)


@pytest.fixture
def honest(server, undisturbed) -> Iterator[Honest]:
    with Honest(server, *undisturbed) as honest:
        yield honest


@pytest.fixture(scope="module")
def hostile_key(server) -> str:
    return str(server.create_key("--project", "hostile", "--scopes", "train,sample,admin"))


@pytest.fixture
def hostile(server, hostile_key) -> Owned:
    return own(server, hostile_key)


def send(http: httpx.Client, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
    """Send a body; fail for a server's error and for an answer that is late."""
    began = time.monotonic()
    answer = http.post(path, content=body, headers=headers)
    assert answer.status_code < 500, f"{path} {headers} {body[:300]!r}: {answer.text}"
    assert time.monotonic() - began < LATE_S, f"{path} {body[:300]!r}"
    return answer


@pytest.mark.parametrize("amount", AMOUNTS)
def test_passes_that_are_damaged_end_as_errors_of_their_sender(server, honest, hostile, amount):
    draw = random.Random(amount)
    with hostile.client(server, V1) as http:
        for round_number in range(4 * amount):
            run, seq = new_run(http, hostile.session, 100 + round_number), 1
            waiting: list[str] = []
            for _ in range(40):
                body = damaged_pass(draw, run, seq)
                path = draw.choice(["/forward_backward", "/forward"])
                answer = send(http, path, body, dict(PROTOBUF))
                if answer.status_code == 200:
                    waiting.append(answer.json()["request_id"])
                    seq += 1
            for request_id in waiting:
                said = result(http, request_id)
                failed = said.headers["content-type"] == "application/json"
                assert not failed or said.json().get("category") == "user", said.text


def damaged_pass(draw: random.Random, run: str, seq: int) -> bytes:
    change = draw.random()
    if change < 0.5:
        return mutations.mutated_message(draw, run, seq)
    if change < 0.9:
        return mutations.mutated_bytes(draw, protobuf(run, seq))
    return protobuf(run, draw.choice([seq, seq, 1, seq + 1]))


def test_what_is_wrong_with_a_body_is_said_before_any_rank_is_asked(tmp_path):
    """The whole application, without ranks: what cannot be parsed gets no further."""
    asyncio.run(_without_ranks(tmp_path))


async def _without_ranks(folder: Path) -> None:
    hub = Hub(ServiceConfig(models=({"name": NAME, "path": "nowhere"},), data=folder))
    key = str(await hub.open())
    hub.is_ready, draw = True, random.Random(0)
    transport = httpx.ASGITransport(create_app(hub), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
        http.headers["X-API-Key"] = key
        session = (await http.post(V1 + "/create_session", json={})).json()["session_id"]
        nobody = nothing(key, session)
        for _ in range(20):
            for name, case in cases_with_json(nobody):
                method, path = routes.place(name, case)
                body = mutations.mutated_json(draw, case["json"])
                answer = await http.request(method, path, content=body, headers=JSON)
                assert answer.status_code < 500, f"{name} {body[:300]!r}: {answer.text}"
        for value in ("\ud800", "\0", float("nan"), {"\ud800": 1}, [float("-inf")]):
            body = json.dumps({"user_metadata": {"a": value}}).encode()
            await http.post(V1 + "/create_session", content=body, headers=JSON)
        for number in range(10):
            paths = {"limit": 1, "offset": number}
            for session in (await http.get(V1 + "/sessions", params=paths)).json()["sessions"]:
                assert (await http.get(f"{V1}/sessions/{session}")).status_code == 200
        assert (await http.post(V1 + "/sessions/search", json={})).status_code == 200
    await hub.close()


def nothing(key: str, session: str) -> Owned:
    run = f"{session}:train:0"
    path = f"tinker://{run}/weights/none"
    return Owned(key, session, run, f"{session}:sample:0", "none", path, path, "none")


def cases_with_json(owned: Owned) -> list[tuple[str, dict[str, Any]]]:
    """Return requests with a JSON body that is not empty, but those that end all others."""
    made = [
        (name, case.make(owned, owned))
        for name, route in ROUTES.items()
        for case in route.cases
        if not name.endswith("/finish")
    ]
    return [(name, request) for name, request in made if request.get("json")]


@pytest.mark.parametrize("amount", AMOUNTS)
def test_json_with_values_that_nobody_wants_is_refused(server, honest, hostile, amount):
    draw = random.Random(amount)
    with hostile.client(server) as http:
        for _ in range(6 * amount):
            for name, case in cases_with_json(hostile):
                method, path = routes.place(name, case)
                body = mutations.mutated_json(draw, case["json"])
                began = time.monotonic()
                answer = http.request(method, path, content=body, headers=JSON)
                assert answer.status_code < 500, f"{name} {body[:300]!r}: {answer.text}"
                assert time.monotonic() - began < LATE_S, f"{name} {body[:300]!r}"


def test_bombs_and_bodies_without_end_are_refused(server, honest, hostile):
    paths = (
        *(V1 + each for each in ("/forward_backward", "/asample", "/optim_step")),
        "/v1/completions",
    )
    with hostile.client(server) as http:
        for (body, headers), path in itertools.product(mutations.bombs(), paths):
            answer = send(http, path, body, headers | {"content-type": "application/x-protobuf"})
            assert answer.status_code in (400, 404, 413, 415, 422), f"{path} {headers}: {answer}"
        for path in paths:
            answer = send(http, path, mutations.DEEP, JSON)
            assert 400 <= answer.status_code < 500
            with contextlib.suppress(httpx.TransportError):  # or it hangs up on who goes on
                endless = http.post(path, content=_endless(), headers={"content-type": "x/y"})
                assert endless.status_code == 413


def test_a_text_that_is_far_too_long_holds_up_nobody(server, honest, hostile):
    with hostile.client(server) as http:
        text = "hello w " * (1 << 19)
        chat = {"model": NAME, "messages": [{"role": "user", "content": text}]}
        for path, body in (
            ("/v1/completions", {"model": NAME, "prompt": text, "max_tokens": 1}),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"messages": [{"role": "user", "content": "\ud800"}]}),
        ):
            answer = send(http, path, json.dumps(body).encode(), JSON)
            assert answer.status_code in (400, 413)


def _endless() -> Iterator[bytes]:
    for _ in range(200):
        yield bytes(1 << 20)


def test_numbers_far_ahead_replayed_and_in_any_order_cost_nobody_anything(server, honest, hostile):
    with hostile.client(server, V1) as http:
        run = new_run(http, hostile.session, 90)
        numbers = [3, 1, 2, 1, 3, 2, 5, 4, 4]
        answers = [
            send(http, "/forward_backward", protobuf(run, seq), dict(PROTOBUF)) for seq in numbers
        ]
        ids: dict[int, set[str]] = {}
        for seq, answer in zip(numbers, answers, strict=True):
            ids.setdefault(seq, set()).add(answer.json()["request_id"])
        assert [len(each) for each in ids.values()] == [1] * 5
        for each in ids.values():
            assert result(http, each.pop()).headers["content-type"] == "application/x-protobuf"
        step = {"model_id": run, "seq_id": 6, "adam_params": {}}
        said = http.post("/optim_step", json=step).json()
        assert result(http, said["request_id"]).json()["metrics"]["step"] == 1.0
        far = send(http, "/forward_backward", protobuf(run, 2**31 - 1), dict(PROTOBUF))
        assert "never came" in result(http, far.json()["request_id"]).json()["error"]


def test_a_pass_that_is_refused_for_one_tenants_sake_is_done_for_the_others(
    server, honest, hostile
):
    """One is wrong from the start; an adapter that was taken down is found missing by the ranks."""
    other = server.create_key("--project", "busy")
    with hostile.client(server, V1) as http, own(server, other).client(server, V1) as busy:
        session = busy.post("/create_session", json={}).json()["session_id"]
        occupied = [new_run(busy, session, number) for number in range(4)]
        for number in range(3):
            run = new_run(http, hostile.session, 80 + number)
            kept = new_run(busy, session, 10 + number)
            for each in occupied:  # the ranks have enough to do: what comes now shares a pass
                send_pass(busy, each, number + 1, large=True)
            wrong = send_pass(http, new_run(http, hostile.session, 180 + number), 1, wrong=True)
            before = send_pass(http, run, 1)
            gone = http.post("/unload_model", json={"model_id": run}).json()
            late = send_pass(http, run, 3)
            good = [send_pass(busy, kept, seq) for seq in range(1, 6)]
            for each in (before, *good):
                assert result(http if each == before else busy, each).content[:1] != b"{"
            assert "not finite" in result(http, wrong).json()["error"]
            assert "error" not in result(http, gone["request_id"]).json()
            assert result(http, late).json()["category"] == "user"


def send_pass(
    http: httpx.Client, run: str, seq: int, *, large: bool = False, wrong: bool = False
) -> str:
    body = protobuf(run, seq, copies=1000 if large else 1)
    if wrong:
        body = mutations.with_nan(body)
    answer = send(http, "/forward_backward", body, dict(PROTOBUF))
    return str(answer.json()["request_id"])


@pytest.mark.parametrize("amount", AMOUNTS)
def test_the_document_holds_no_request_that_ends_in_a_servers_error(
    server, honest, hostile, amount
):
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in document.get_all_operations():
        operation = found.ok()
        _attempt(operation.as_strategy(), hostile, 4 * amount)
        with contextlib.suppress(Unsatisfiable):  # where there is nothing to be wrong
            wrong = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
            _attempt(wrong, hostile, 4 * amount)


def _attempt(strategy: Any, hostile: Owned, count: int) -> None:
    @seed(0)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def attempt(case: Any) -> None:
        _with_names_that_exist(case, hostile)
        began = time.monotonic()
        response = case.call(headers={"X-API-Key": hostile.key}, timeout=2 * LATE_S)
        case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])
        assert time.monotonic() - began < LATE_S, case.as_curl_command()

    test: Callable[[], None] = attempt
    test()


def _with_names_that_exist(case: Any, hostile: Owned) -> None:
    """Put ids that exist in place of three in four, or nothing would get beyond them."""
    known = {
        "session_id": hostile.session,
        "run_id": hostile.run,
        "model_id": hostile.run,
        "sampler_id": hostile.sampler,
        "sampling_session_id": hostile.sampler,
        "request_id": hostile.request,
        "base_model": NAME,
        "model": NAME,
        "tinker_path": hostile.state,
        "source_path": hostile.state,
        "checkpoint_id": "weights/state",
    }
    draw = random.Random(repr(case.body))
    if case.path.endswith("/finish"):
        return
    for holder in (case.path_parameters, case.body):
        if isinstance(holder, dict):
            for name in holder.keys() & known.keys():
                if draw.random() < 0.75:
                    holder[name] = known[name]
