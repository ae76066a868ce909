"""Another project's key reads, samples, changes and resumes nothing, whatever route it takes."""

import hashlib
import http.client
import re
import sqlite3
import time
import urllib.parse
import warnings

import httpx
import pytest
import tinker

from megatrain.service.auth.key import digest
from tests.fixtures.small_model import make_small_model
from tests.service import routes
from tests.service.configured import ConfiguredServer
from tests.service.mutations import with_nan
from tests.service.owned import DONE, PROTOBUF, Owned, new_run, own, protobuf, result
from tests.service.routes import ROUTES, Case
from tests.service.sdk_clients import client
from tests.service.server import NAME

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore::FutureWarning")]

SCOPES = ("train", "sample", "admin")
SESSION_S = 20.0
"""More than twice what the official client lets pass between two heartbeats."""
GAP_S = 5.0
REPLAY_S = 240.0
"""Ranks that a crowded machine has kept from their heartbeats start anew, and do it all again."""
EVIL = (
    "../evil",
    "../../../../etc/passwd",
    "a/../../evil",
    "/etc/passwd",
    "..",
    ".",
    ".hidden",
    "a/b",
    "a\\..\\evil",
    "%2e%2e%2fevil",
    "..%2fevil",
    "a\0b",
    "evil\n",
    "x" * 201,
    "\u2025/evil",
    "\uff0e\uff0e\uff0fevil",
    "e\u0301vil",
    "evil\u202e",
    "CON:",
    "file:///etc/passwd",
    "s3://bucket/evil",
    "-",
    "~",
    "$HOME",
    "*",
)
"""Names that leave their folder, on some system or another, or are not what they look like."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    warnings.simplefilter("ignore")
    server = ConfiguredServer(
        make_small_model(tmp_path_factory.mktemp("model")),
        tmp_path_factory.mktemp("service"),
        served={"sampler": {"engine": "transformers"}},
    )
    server.start()
    yield server
    assert server.stop() == 0


def key(server: ConfiguredServer, project: str, scopes: tuple[str, ...] = SCOPES) -> str:
    return server.create_key("--project", project, "--scopes", ",".join(scopes))


@pytest.fixture(scope="module")
def owner(server) -> Owned:
    return own(server, key(server, "owner"))


@pytest.fixture(scope="module")
def stranger(server) -> Owned:
    return own(server, key(server, "stranger"))


def test_every_route_of_the_service_is_in_the_table():
    assert sorted(routes.routes_of_the_service()) == sorted(ROUTES)


def files_of(server: ConfiguredServer) -> dict[str, str]:
    """Return digests of what is kept for projects."""
    folder = server.folder / "data" / "files"
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def seen_by(server: ConfiguredServer, owner: Owned) -> dict[str, object]:
    """Return all that an owner sees of what it has."""
    with owner.client(server) as http:
        run = f"/api/v1/training_runs/{owner.run}"
        paths = (run, f"{run}/checkpoints", "/api/v1/checkpoints", "/api/v1/sessions")
        paths += (f"/api/v1/sessions/{owner.session}", f"/api/v1/samplers/{owner.sampler}")
        seen: dict[str, object] = {path: http.get(path).raise_for_status().json() for path in paths}
        beat = http.post("/api/v1/session_heartbeat", json={"session_id": owner.session})
        again = {"model_id": owner.run, "seq_id": DONE, "adam_params": {}}
        seen["beat"] = beat.status_code
        seen["done"] = http.post("/api/v1/optim_step", json=again).json()
    return seen


def test_a_strangers_key_gets_nothing_and_changes_nothing_and_the_owners_key_gets_it(
    server, owner, stranger
):
    seen, files = seen_by(server, owner), files_of(server)
    with stranger.client(server) as http:
        for name, case in cases():
            request = case.make(owner, stranger)
            answer = routes.call(http, name, request)
            assert answer.status_code == case.stranger, f"{name}: {answer.text}"
            # What is refused may repeat what was asked for, and nothing else.
            told = [each for each in owner.names if each in answer.text]
            assert answer.status_code >= 400 or not told, f"{name}: {answer.text}"
            assert all(each in str(request) for each in told), f"{name}: {answer.text}"
    assert seen_by(server, owner) == seen
    assert {path: text for path, text in files_of(server).items() if path in files} == files
    with owner.client(server) as http:
        document = http.get("/openapi.json").json()
        for name, case in cases():
            answer = routes.call(http, name, case.make(owner, owner))
            assert answer.status_code == case.owner, f"{name}: {answer.text}"
            is_documented = routes.check_documented(document, name, answer)
            is_json = answer.status_code == 200 and "json" in answer.headers["content-type"]
            assert is_documented or not is_json or " /api/v1/" not in name, name


def cases() -> list[tuple[str, Case]]:
    return [(name, case) for name, route in ROUTES.items() for case in route.cases]


@pytest.fixture
def keyed(server) -> Owned:
    """Somebody with a run of their own, whose key is replaced by others."""
    return own(server, key(server, "keyed"))


def statuses(server: ConfiguredServer, owned: Owned, key: str) -> dict[str, int]:
    """Return what every route answers to a key, where the request itself is the owner's."""
    headers = {"X-API-Key": key.encode("latin-1")}  # as on the wire
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        return {
            name: routes.call(http, name, route.cases[0].make(owned, owned)).status_code
            for name, route in ROUTES.items()
        }


def test_a_key_that_is_missing_unknown_revoked_or_over_opens_nothing_that_asks_for_one(
    server, keyed
):
    revoked, expired = key(server, "keyed"), key(server, "keyed")
    with sqlite3.connect(server.folder / "data" / "service.db") as database:
        update = "UPDATE keys SET {} = 1.0 WHERE hash = ?"
        database.execute(update.format("revoked"), [digest(revoked)])
        database.execute(update.format("expires"), [digest(expired)])
    for wrong in ("", "tml-", "tml-unknown-unknown", "dummy", "\u00e9", revoked, expired):
        found = statuses(server, keyed, wrong)
        for name, route in ROUTES.items():
            assert (found[name] == 401) == (route.scope is not None), f"{name}: {wrong}"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_without_a_scope_is_refused_where_it_is_needed(server, keyed, scope):
    others = tuple(each for each in SCOPES if each not in (scope, "admin"))
    found = statuses(server, keyed, key(server, "keyed", others))
    needing = {name for name, route in ROUTES.items() if route.scope == scope}
    assert {name for name in needing if found[name] == 403} == needing
    allowed = {name for name, route in ROUTES.items() if route.scope in (None, "read", *others)}
    assert not {name for name in allowed if found[name] in (401, 403)}


def test_a_public_checkpoint_is_read_by_others_and_changed_by_none(server):
    mine, other = own(server, key(server, "giver")), own(server, key(server, "taker"))
    one = f"/api/v1/training_runs/{mine.run}/checkpoints/weights/state"
    with mine.client(server) as http:
        assert http.post(f"{one}/publish").status_code == 204
    with other.client(server) as http:
        info = http.post("/api/v1/weights_info", json={"tinker_path": mine.state})
        assert info.json()["lora_rank"] == 2
        copy = {"source_path": mine.state, "session_id": other.session, "model_seq_id": 30}
        assert http.post("/api/v1/copy_weights", json=copy).status_code == 200
        refused = [
            http.delete(one),
            http.delete(f"{one}/publish"),
            http.put(f"{one}/ttl", json={"ttl_seconds": 3600}),
            http.get(f"{one}/external_weights_urls"),
            http.get("/api/console/archive", params={"path": mine.state}),
        ]
        assert [each.status_code for each in refused] == [404] * len(refused)
        assert mine.state not in http.get("/api/v1/checkpoints").text
    with mine.client(server) as http:
        listed = http.get(f"/api/v1/training_runs/{mine.run}/checkpoints").json()["checkpoints"]
        kept = next(each for each in listed if each["tinker_path"] == mine.state)
        assert kept["public"]
        assert "expires_at" not in kept
        assert http.delete(f"{one}/publish").status_code == 204
    with other.client(server) as http:
        info = http.post("/api/v1/weights_info", json={"tinker_path": mine.state})
        assert info.status_code == 404


def tree_of(server: ConfiguredServer) -> set[str]:
    """Return all paths around the service's folder, but what its database and log make."""
    top = server.folder.parent
    return {
        str(path.relative_to(top))
        for path in top.rglob("*")
        if "scratch" not in path.parts and not path.name.startswith(("service.db", "journal"))
    }


def test_names_of_checkpoints_cannot_leave_their_folder(server, keyed):
    with keyed.client(server, "/api/v1") as http:
        before = tree_of(server)
        for name in EVIL:
            for route in ("save_weights", "save_weights_for_sampler", "save_weights_external"):
                body = {"model_id": keyed.run, "path": name}
                answer = http.post(f"/{route}", json=body)
                assert answer.status_code == 200, answer.text
                said = result(http, answer.json()["request_id"]).json()
                assert said["category"] == "user", f"{name!r}: {said}"
                assert "name" in said["error"]
        assert tree_of(server) == before
        for name in ("nul", "CON", "aux.txt", "com1"):  # devices, elsewhere; here names like others
            answer = http.post("/save_weights", json={"model_id": keyed.run, "path": name})
            said = result(http, answer.json()["request_id"]).json()
            assert said["path"] == f"tinker://{keyed.run}/weights/{name}"


def test_names_in_addresses_lead_nowhere(server, keyed):
    """What is asked for goes over the wire as it is: no client tidies it up."""
    before = tree_of(server)
    quoted = [urllib.parse.quote(name, safe="") for name in EVIL]
    raw = ["../evil", "a/../../evil", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "%00"]
    for name in [*quoted, *raw, "%ff%fe", "a" * 5000]:
        for template in ROUTES:
            method, path = template.split(" ", 1)
            if "{" not in path or "console/assets" in path or "models/{model" in path:
                continue
            place = re.sub(r"\{[^}]*\}", name, path)
            status, text = ask(server, keyed.key, method, place)
            # A body is missing: 422 is as good as 404, and some of these are another route.
            assert status in (204, 400, 401, 404, 405, 410, 422), f"{method} {place}: {status}"
            assert "root:" not in text
    assert tree_of(server) == before


def ask(server: ConfiguredServer, key: str, method: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request(method, path, body=b"{}", headers={"X-API-Key": key})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


def test_paths_in_bodies_lead_nowhere(server, keyed):
    before = tree_of(server)
    with keyed.client(server) as client:
        for name in EVIL:
            path = f"tinker://{keyed.run}/weights/{name}"
            bodies = {
                "/api/v1/weights_info": {"tinker_path": path},
                "/api/v1/load_weights": {
                    "session_id": keyed.session,
                    "model_seq_id": 20,
                    "path": path,
                },
                "/api/v1/copy_weights": {
                    "source_path": path,
                    "session_id": keyed.session,
                    "model_seq_id": 21,
                },
                "/api/v1/create_sampling_session": {
                    "session_id": keyed.session,
                    "sampling_session_seq_id": 22,
                    "model_path": path,
                },
                "/v1/completions": {"model": path, "prompt": "x", "max_tokens": 1},
                "/api/v1/get_info": {"model_id": name},
            }
            for route, body in bodies.items():
                answer = client.post(route, json=body)
                assert answer.status_code in (404, 422), f"{route} {name!r}: {answer.text}"
    assert tree_of(server) == before


@pytest.fixture(scope="module")
def limited(tmp_path_factory, checkpoints):
    """A service of few checkpoints and runs, whose sessions are short."""
    warnings.simplefilter("ignore")
    server = ConfiguredServer(
        checkpoints("qwen3"),
        tmp_path_factory.mktemp("limited"),
        served={"sampler": {"engine": "none"}},
        limits={"max_checkpoints": 2, "max_runs": 2},
        times={"session_s": SESSION_S, "janitor_s": 1.0, "poll_s": 2.0, "gap_s": GAP_S},
    )
    server.start()
    yield server
    assert server.stop() == 0


@pytest.mark.slow
def test_a_project_may_have_so_many_checkpoints(limited):
    service = client(limited)
    training = service.create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    first = training.save_state("first").result().path
    training.save_weights_for_sampler("second").result()
    for save in (training.save_state, training.save_weights_external):
        with pytest.raises(tinker.RequestFailedError, match="has 2 checkpoints"):
            save("third").result()
    training.save_state("first", overwrite=True).result()  # in its place
    service.create_rest_client().delete_checkpoint_from_tinker_path(first).result()
    training.save_state("third").result()


@pytest.mark.slow
def test_a_session_that_is_over_while_its_requests_run_leaves_nothing(limited):
    """Every request gets a result, the adapters leave the ranks, and a new start finds none."""
    with limited.http(limited.create_key("--project", "silent")) as http:
        session, runs = begin(http)
        limit = time.monotonic() + SESSION_S + 30
        requests, seq, status = [], 0, 200
        while status == 200 and time.monotonic() < limit:
            seq += 1
            for run in runs:
                answer = http.post(
                    "/forward_backward", content=protobuf(run, seq), headers=PROTOBUF
                )
                status = answer.status_code
                requests += [answer.json()["request_id"]] if status == 200 else []
            time.sleep(0.02)
        assert status == 404
        assert http.post("/session_heartbeat", json={"session_id": session}).status_code == 410
        for request in requests:
            result(http, request, REPLAY_S)
        # The project may have two runs: there is room for two again.
        begin(http)
        limited.kill()
        limited.start()
        assert http.post("/get_info", json={"model_id": runs[0]}).status_code == 404
    assert "is not on the ranks any more" not in limited.log


@pytest.mark.slow
def test_what_was_refused_or_given_up_is_so_after_a_new_start(limited):
    with limited.http(limited.create_key("--project", "waiting")) as http:
        _, (run, _) = begin(http)

        def send(seq: int, content: bytes | None = None) -> str:
            body = protobuf(run, seq) if content is None else content
            return str(
                http.post("/forward_backward", content=body, headers=PROTOBUF).json()["request_id"]
            )

        assert "never came" in result(http, send(3)).json()["error"]
        wrong = send(5, with_nan(protobuf(run, 5)))
        save = {"model_id": run, "path": "../evil", "seq_id": 6}
        evil = http.post("/save_weights", json=save).json()["request_id"]
        limited.kill()
        limited.start()
        assert result(http, send(4)).headers["content-type"] == "application/x-protobuf"
        assert "not finite" in result(http, wrong).json()["error"]
        assert "name" in result(http, evil).json()["error"]


def begin(http: httpx.Client) -> tuple[str, list[str]]:
    """Begin a session with two runs."""
    session = http.post("/create_session", json={}).json()["session_id"]
    return session, [new_run(http, session, number) for number in range(2)]
