"""What projects use: counted once, by kind and hour, as the official client tells it."""

import sqlite3
import time
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import tinker
from tinker import types

from tests.fixtures.small_model import make_small_model
from tests.service.mutations import with_nan
from tests.service.owned import PROTOBUF, new_run, protobuf, result
from tests.service.sdk_clients import client
from tests.service.server import NAME, Server

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = make_small_model(tmp_path_factory.mktemp("model"))
    server = Server(model, tmp_path_factory.mktemp("usage"))
    server.start()
    yield server
    assert server.stop() == 0


def hours(now: datetime) -> tuple[datetime, datetime]:
    full = now.replace(minute=0, second=0, microsecond=0)
    return full - timedelta(hours=1), full + timedelta(hours=2)


def test_the_official_client_reads_tokens_by_hour_session_and_kind(server):
    began = datetime.now(UTC)
    service = client(server, user_metadata={"purpose": "usage"})
    training = service.create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([5, 6, 7, 8]),
        loss_fn_inputs={"target_tokens": types.TensorData(data=[6, 7, 8, 9], dtype="int64")},
    )
    for _ in range(3):
        training.forward_backward([datum, datum], "cross_entropy").result()
    sampler = service.create_sampling_client(base_model=NAME)
    drawn = sampler.sample(
        types.ModelInput.from_ints([5, 6, 7]), 2, types.SamplingParams(max_tokens=5)
    ).result()
    openai = httpx.post(
        f"{server.url}/v1/completions",
        headers={"X-API-Key": server.key},
        json={"model": NAME, "prompt": [5, 6, 7, 8, 9], "max_tokens": 4},
        timeout=60,
    ).raise_for_status()
    told = service.create_rest_client().get_billing_usage(*hours(began)).result()
    session = training.get_info().model_id.split(":")[0]
    counts: dict[tuple[str | None, str], int] = {}
    for each in told.data:
        assert each.base_model == NAME
        assert each.project_id == "default"
        assert each.bucket_end - each.bucket_start == timedelta(hours=1)
        assert hours(began)[0] <= each.bucket_start < hours(began)[1]
        key = each.session_id, each.event_info.type
        counts[key] = counts.get(key, 0) + each.event_info.token_count
    used = openai.json()["usage"]
    assert counts == {
        (session, "training"): 3 * 2 * 4,
        (session, "sampling_prefill"): 3,
        (session, "sampling_sample"): sum(len(each.tokens) for each in drawn.sequences),
        (None, "sampling_prefill"): used["prompt_tokens"],
        (None, "sampling_sample"): used["completion_tokens"],
    }
    assert told.sessions[session].user_metadata == {"purpose": "usage"}


def test_windows_are_full_hours_of_at_most_two_weeks(server):
    rest = client(server).create_rest_client()
    start, end = hours(datetime.now(UTC))
    for wrong in (
        (end, start),
        (start, start),
        (start + timedelta(minutes=1), end),
        (end - timedelta(days=15), end),
    ):
        with pytest.raises(tinker.APIStatusError, match="hour"):
            rest.get_billing_usage(*wrong).result()


def test_what_comes_again_or_fails_is_not_counted(server):
    with server.http(server.create_key("--project", "counted")) as http:
        session = http.post("/create_session", json={}).json()["session_id"]
        run = new_run(http, session, 0)
        bodies = [protobuf(run, 1)] * 3 + [with_nan(protobuf(run, 2, copies=4))]
        sent = [http.post("/forward_backward", content=each, headers=PROTOBUF) for each in bodies]
        ids = [each.json()["request_id"] for each in sent]
        assert len(set(ids[:3])) == 1
        assert "not finite" in result(http, ids[3]).json()["error"]
    query = "SELECT SUM(tokens), SUM(requests) FROM usage WHERE project = 'counted'"
    limit = time.monotonic() + 30
    with sqlite3.connect(server.folder / "data" / "service.db") as database:
        while (found := database.execute(query).fetchone()) != (3, 2):
            assert time.monotonic() < limit, found
            time.sleep(0.2)
