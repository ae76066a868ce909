"""What one project owns in a service, and requests of the official client by themselves."""

import time
from dataclasses import dataclass
from typing import Any

import httpx
import tinker
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tests.service.server import NAME, Server

PROTOBUF = {"content-type": "application/x-protobuf"}
DONE, SEQ = 4, 100
"""Numbers of requests of the owner's run: one that is done, and some that are accepted and wait."""


@dataclass
class Owned:
    """What a project has."""

    key: str
    session: str
    run: str
    sampler: str
    request: str
    """Id of a request that is done."""
    state: str
    """Path of a checkpoint to go on from."""
    weights: str
    """Path of one to sample from."""
    ticket: str
    """Of a file's URL."""

    @property
    def names(self) -> tuple[str, ...]:
        """What nobody else must ever read."""
        return self.session, self.run, self.sampler, self.request

    def client(self, server: Server, prefix: str = "") -> httpx.Client:
        """Return a client with this project's key."""
        headers = {"X-API-Key": self.key}
        return httpx.Client(base_url=server.url + prefix, headers=headers, timeout=60)


def own(server: Server, key: str) -> Owned:
    """Make one of everything."""
    with httpx.Client(
        base_url=f"{server.url}/api/v1", headers={"X-API-Key": key}, timeout=60
    ) as http:
        session = http.post("/create_session", json={}).json()["session_id"]
        run = new_run(http, session, 0)

        def done(route: str, seq: int, **body: Any) -> dict[str, Any]:
            body |= {"model_id": run, "seq_id": seq}
            return result(http, http.post(f"/{route}", json=body).json()["request_id"]).json()

        state = done("save_weights", 1, path="state")["path"]
        weights = done("save_weights_for_sampler", 2, path="weights")["path"]
        done("save_weights_for_sampler", 3, sampling_session_seq_id=49)  # it is live
        step = {"model_id": run, "adam_params": {}, "seq_id": DONE}
        request = http.post("/optim_step", json=step).json()["request_id"]
        result(http, request)
        made = {"session_id": session, "sampling_session_seq_id": 50, "base_model": NAME}
        sampler = http.post("/create_sampling_session", json=made).json()["sampling_session_id"]
        one = f"/training_runs/{run}/checkpoints/weights/state"
        urls = http.get(f"{one}/external_weights_urls").json()["urls"]
    ticket = next(iter(urls.values())).rsplit("/", 1)[1]
    return Owned(key, session, run, sampler, request, state, weights, ticket)


def new_run(http: httpx.Client, session: str, number: int) -> str:
    """Make a run, of whose API this is a client, and return its id."""
    body = {
        "session_id": session,
        "model_seq_id": number,
        "base_model": NAME,
        "lora_config": {"rank": 2},
    }
    made = http.post("/create_model", json=body).raise_for_status().json()
    result(http, made["request_id"])
    return str(made["model_id"])


def result(http: httpx.Client, request_id: str, within_s: float = 60.0) -> httpx.Response:
    """Return a request's result, which must come in time."""
    limit = time.monotonic() + within_s
    while True:
        answer = http.post("/retrieve_future", json={"request_id": request_id})
        if answer.status_code != 408:
            return answer.raise_for_status()
        assert time.monotonic() < limit, f"request {request_id} has no result"


def batch(copies: int = 1) -> ForwardBackwardInput:
    """Return data of a forward_backward."""
    targets = tinker.types.TensorData(data=[6, 7, 8], dtype="int64", shape=[3])
    datum = tinker.types.Datum(
        model_input=tinker.types.ModelInput.from_ints([5, 6, 7]),
        loss_fn_inputs={"target_tokens": targets},
    )
    return ForwardBackwardInput(data=[datum] * copies, loss_fn="cross_entropy")


def protobuf(run: str, seq: int, *, copies: int = 1) -> bytes:
    """Return the body that the official client sends for a forward_backward."""
    request = ForwardBackwardRequest(
        forward_backward_input=batch(copies), model_id=tinker.types.ModelID(run), seq_id=seq
    )
    return bytes(forward_backward_request_to_proto(request).SerializeToString())


def as_json(run: str, seq: int, name: str = "forward_backward_input") -> dict[str, Any]:
    """Return the body that older clients send."""
    datum = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "loss_fn_inputs": {"target_tokens": {"data": [6, 7, 8], "dtype": "int64", "shape": [3]}},
    }
    return {"model_id": run, "seq_id": seq, name: {"data": [datum], "loss_fn": "cross_entropy"}}


def sample(session: str) -> dict[str, Any]:
    """Return the body of a sample."""
    return {
        "sampling_session_id": session,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 1},
        "prompt_logprobs": True,
    }
