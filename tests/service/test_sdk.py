"""The official Tinker client against a service of its own, unmodified.

Log-probabilities and, through a step, gradients are Transformers + PEFT's to 1e-5 in float32; what
is split over requests or shared with other tenants is the same to 1e-6.
"""

import threading
import time

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from tests.service.sdk_clients import client, datum, logprobs, tokens
from tests.service.server import NAME, Server
from tests.service.truth import MUON, Truth

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore::FutureWarning")]

CLOSE = 1e-5


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoints):
    server = Server(checkpoints("qwen3"), tmp_path_factory.mktemp("service"), "--sampler", "none")
    server.start()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def truth(checkpoints):
    return Truth(checkpoints("qwen3"))


def test_a_step_gives_what_transformers_and_peft_give(server, truth):
    training = client(server).create_lora_training_client(base_model=NAME, rank=4, seed=3).result()
    data = [datum(1), datum(2, 20, weights=[1.0] * 10 + [-0.5] * 10)]
    before = training.forward(data, "cross_entropy").result()
    path = training.save_weights_for_sampler("before").result().path
    ours = training.forward_backward(data, "cross_entropy")
    stepped = training.optim_step(types.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0))
    assert logprobs(ours.result()) == logprobs(before)
    after = training.forward(data, "cross_entropy").result()
    folder = server.folder / "data" / "files" / path.removeprefix("tinker://").replace(":", "_")
    expected = truth.step(folder, data, lr=1e-2, clip=1.0)
    np.testing.assert_allclose(np.concatenate(logprobs(before)), expected.before, atol=CLOSE)
    assert ours.result().metrics["loss:sum"] == pytest.approx(expected.loss, rel=CLOSE)
    assert stepped.result().metrics["grad_norm"] == pytest.approx(expected.norm, rel=1e-4)
    np.testing.assert_allclose(np.concatenate(logprobs(after)), expected.after, atol=1e-4)


def test_dimuon_is_torchs_muon(server, truth):
    """Newton-Schulz runs in bfloat16 in both, so they agree to its 8 bits of the change.

    The head is left out: it is AdamW's, as Muon's author says.
    """
    training = (
        client(server)
        .create_lora_training_client(
            base_model=NAME,
            rank=4,
            seed=5,
            train_unembed=False,
            optimizer=types.DimuonOptimizerConfig(),
        )
        .result()
    )
    data = [datum(1), datum(2, 20)]
    path = training.save_weights_for_sampler("before").result().path
    before = training.forward_backward(data, "cross_entropy").result()
    stepped = training.optim_step(types.DimuonParams(learning_rate=0.01, beta1=0.9)).result()
    after = training.forward(data, "cross_entropy").result()
    folder = server.folder / "data" / "files" / path.removeprefix("tinker://").replace(":", "_")
    expected = truth.step(folder, data, lr=0.01, clip=0.0, make=MUON)
    assert stepped.metrics["grad_norm"] == pytest.approx(expected.norm, rel=1e-4)
    change = np.concatenate(logprobs(after)) - np.concatenate(logprobs(before))
    np.testing.assert_allclose(
        change, expected.after - expected.before, atol=2e-2 * abs(change).max()
    )
    assert abs(change).max() > 0.01
    with pytest.raises(tinker.RequestFailedError, match="dimuon"):
        training.optim_step(types.AdamParams(learning_rate=1e-3)).result()


def test_a_batch_that_is_split_over_requests_is_the_same(server):
    service = client(server)
    whole = service.create_lora_training_client(base_model=NAME, rank=4, seed=5).result()
    split = service.create_lora_training_client(base_model=NAME, rank=4, seed=5).result()
    data = [datum(seed, 8 + seed) for seed in range(6)]
    whole.forward_backward(data, "cross_entropy").result()
    for part in (data[:1], data[1:4], data[4:]):
        split.forward_backward(part, "cross_entropy")
    params = types.AdamParams(learning_rate=1e-2)
    norms = [each.optim_step(params).result().metrics["grad_norm"] for each in (whole, split)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    results = [logprobs(each.forward(data, "cross_entropy").result()) for each in (whole, split)]
    np.testing.assert_allclose(np.concatenate(results[0]), np.concatenate(results[1]), atol=CLOSE)


def test_tenants_that_share_passes_get_what_they_get_alone(server):
    service = client(server)

    def train(seed: int, results: dict[int, list]) -> None:
        training = service.create_lora_training_client(base_model=NAME, rank=4, seed=seed).result()
        got = []
        for step in range(3):
            passed = training.forward_backward([datum(seed + step)], "cross_entropy")
            stepped = training.optim_step(types.AdamParams(learning_rate=1e-2))
            got.append((passed.result().metrics["loss:sum"], stepped.result().metrics["grad_norm"]))
        results[seed] = got

    alone: dict[int, list] = {}
    for seed in range(4):
        train(seed, alone)
    together: dict[int, list] = {}
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        np.testing.assert_allclose(together[seed], alone[seed], rtol=1e-5)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro"])
def test_policy_losses_are_sums_of_what_their_formulas_say(server, loss_fn):
    training = client(server).create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    plain = training.forward([datum(7)], "cross_entropy").result()
    logps = np.array(logprobs(plain)[0])
    old, advantages = logps - 0.3, np.linspace(-1, 1, len(logps))
    given = datum(7, logprobs=old.tolist(), advantages=advantages.tolist())
    ratio = np.exp(logps - old)
    expected = {
        "importance_sampling": -(ratio * advantages).sum(),
        "ppo": -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages).sum(),
        "cispo": -(np.clip(ratio, 0.0, 4.0) * logps * advantages).sum(),
        "dro": -(logps * advantages - 0.5 * 0.05 * (logps - old) ** 2).sum(),
    }[loss_fn]
    result = training.forward_backward([given], loss_fn).result()
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_several_targets_a_position_are_weighted_and_all_told(server):
    training = client(server).create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    ids = tokens(3, 5)
    targets = np.array([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]])
    weights = np.array([[1, 0.5]] * 5)
    wide = types.Datum(
        model_input=types.ModelInput.from_ints(ids),
        loss_fn_inputs={
            "target_tokens": types.TensorData(
                data=targets.ravel().tolist(), dtype="int64", shape=[5, 2]
            ),
            "weights": types.TensorData(
                data=weights.ravel().tolist(), dtype="float32", shape=[5, 2]
            ),
        },
    )
    result = training.forward_backward([wide], "cross_entropy").result()
    found = np.array(result.loss_fn_outputs[0]["logprobs"].data).reshape(5, 2)
    assert result.metrics["loss:sum"] == pytest.approx(-(weights * found).sum(), rel=1e-5)


def test_a_custom_loss_is_evaluated_by_the_client(server):
    torch = pytest.importorskip("torch")
    training = client(server).create_lora_training_client(base_model=NAME, rank=2, seed=1).result()

    def loss(data, logps):
        total = sum((each**2).sum() for each in logps)
        return total, {"squares": float(total)}

    result = training.forward_backward_custom([datum(4)], loss).result()
    assert result.metrics["squares"] == pytest.approx(result.metrics["loss:sum"], rel=1e-4)
    assert torch.isfinite(torch.tensor(result.metrics["squares"]))
    norm = training.optim_step(types.AdamParams(learning_rate=1e-3)).result().metrics["grad_norm"]
    assert norm > 0


def test_a_state_goes_on_as_if_it_had_not_been_saved(server):
    service = client(server)
    first = service.create_lora_training_client(base_model=NAME, rank=4, seed=9).result()

    def steps(training, numbers) -> list[float]:
        got = []
        for number in numbers:
            passed = training.forward_backward([datum(number)], "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            got.append(passed.result().metrics["loss:sum"])
        return got

    steps(first, range(3))
    path = first.save_state("here").result().path
    expected = steps(first, range(3, 6))
    second = service.create_training_client_from_state_with_optimizer(path).result()
    assert steps(second, range(3, 6)) == pytest.approx(expected, rel=1e-6)
    fresh = service.create_training_client_from_state(path).result()
    assert steps(fresh, range(3, 6)) != pytest.approx(expected, rel=1e-6)
    first.load_state_with_optimizer(path).result()
    assert steps(first, range(3, 6)) == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_done_is_said_at_once_and_what_follows_goes_on(server):
    training = client(server).create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    start = time.monotonic()
    with pytest.raises(tinker.RequestFailedError, match="importance_sampling"):
        training.forward_backward([datum(1)], "stable_reinforce").result()
    with pytest.raises(tinker.RequestFailedError, match="rank"):
        client(server).create_lora_training_client(base_model=NAME, rank=4096).result()
    nan = datum(1, weights=[float("nan")] * 12)
    with pytest.raises(tinker.RequestFailedError, match="weights"):
        training.forward_backward([nan], "cross_entropy").result()
    training.save_state("twice").result()
    with pytest.raises(tinker.RequestFailedError, match="already"):
        training.save_state("twice").result()
    assert training.forward_backward([datum(1)], "cross_entropy").result().metrics["loss:sum"] > 0
    assert time.monotonic() - start < 60


def test_checkpoints_are_listed_kept_published_and_deleted(server):
    service = client(server)
    training = service.create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    path = training.save_state("kept", ttl_seconds=7200).result().path
    rest = service.create_rest_client()
    run = path.removeprefix("tinker://").split("/")[0]
    listed = rest.list_checkpoints(run).result().checkpoints
    assert [each.tinker_path for each in listed] == [path]
    assert listed[0].expires_at is not None
    assert rest.get_training_run(run).result().lora_rank == 2
    assert rest.get_weights_info_by_tinker_path(path).result().base_model == NAME
    rest.publish_checkpoint_from_tinker_path(path).result()
    other = server.create_key("--project", "reader")
    stranger = client(server, other)
    assert stranger.create_training_client_from_state(path).result() is not None
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(run).result().checkpoints == []


def test_a_prompt_is_scored_by_the_trainer_where_nobody_samples(server, truth):
    service = client(server)
    training = service.create_lora_training_client(base_model=NAME, rank=4, seed=3).result()
    training.forward_backward([datum(1)], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    sampler = training.save_weights_and_get_sampling_client()
    prompt = tokens(11, 10)
    found = sampler.compute_logprobs(types.ModelInput.from_ints(prompt)).result()
    scored = types.Datum(
        model_input=types.ModelInput.from_ints(prompt[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=prompt[1:], dtype="int64", shape=[9])
        },
    )
    expected = training.forward([scored], "cross_entropy").result()
    assert found[0] is None
    np.testing.assert_allclose(found[1:], logprobs(expected)[0], atol=CLOSE)


def test_another_key_sees_nothing(server):
    training = client(server).create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    path = training.save_state("mine").result().path
    run = path.removeprefix("tinker://").split("/")[0]
    session = run.split(":")[0]
    other = server.create_key("--project", "stranger")
    with server.http(other) as http:
        answers = [
            http.post("/get_info", json={"model_id": run}),
            http.post("/optim_step", json={"model_id": run, "seq_id": 9, "adam_params": {}}),
            http.post("/save_weights", json={"model_id": run, "path": "x", "seq_id": 9}),
            http.post("/weights_info", json={"tinker_path": path}),
            http.get(f"/training_runs/{run}"),
            http.get(f"/training_runs/{run}/checkpoints"),
            http.delete(f"/training_runs/{run}/checkpoints/weights/mine"),
            http.post(f"/training_runs/{run}/checkpoints/weights/mine/publish"),
            http.put(
                f"/training_runs/{run}/checkpoints/weights/mine/ttl", json={"ttl_seconds": 3600}
            ),
            http.get(f"/training_runs/{run}/checkpoints/weights/mine/external_weights_urls"),
            http.get(f"/sessions/{session}"),
            http.post(
                "/create_model",
                json={
                    "session_id": session,
                    "model_seq_id": 5,
                    "base_model": NAME,
                    "lora_config": {"rank": 2},
                },
            ),
            http.post(
                "/create_sampling_session",
                json={"session_id": session, "sampling_session_seq_id": 5, "base_model": NAME},
            ),
        ]
        assert [each.status_code for each in answers] == [404] * len(answers)
        assert http.post("/session_heartbeat", json={"session_id": session}).status_code == 410
        assert run not in http.get("/training_runs").text
        assert run not in http.get("/checkpoints").text
        assert session not in http.get("/sessions").text
        assert session not in http.post("/sessions/search", json={}).text


def test_without_a_key_nothing_is_said(server):
    for key in ("", "tml-wrong-wrong-wrong", "dummy"):
        with server.http(key) as http:
            assert http.get("/training_runs").status_code == 401
            assert http.post("/create_session", json={}).status_code == 401
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/api/v1/healthz").json() == {"status": "ok"}


def test_names_that_leave_their_folder_are_refused(server):
    training = client(server).create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    for name in ("../evil", "a/b", "..", "/etc/passwd", ".hidden", "x" * 201):
        with pytest.raises(tinker.RequestFailedError, match="name"):
            training.save_state(name).result()


def test_a_request_that_comes_twice_is_done_once(server):
    training = client(server).create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    training.forward_backward([datum(1)], "cross_entropy").result()
    run = training.get_info().model_id
    body = {"model_id": run, "seq_id": 2, "adam_params": {"learning_rate": 0.01}}
    with server.http() as http:
        ids = {http.post("/optim_step", json=body).json()["request_id"] for _ in range(3)}
        assert len(ids) == 1
        got = http.post("/retrieve_future", json={"request_id": ids.pop()}).json()
        assert got["metrics"]["step"] == 1.0


def test_sessions_are_found_and_storage_is_counted(server):
    service = client(server)
    training = service.create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    path = training.save_state("found").result().path
    session = path.removeprefix("tinker://").split(":")[0]
    rest = service.create_rest_client()
    found = rest.search_sessions(types.SessionSearchRequest()).result()
    mine = next(each for each in found.sessions if each.session_id == session)
    assert mine.checkpoints_count == 1
    assert mine.checkpoint_storage_bytes > 1000
    usage = rest.get_current_checkpoint_storage_usage().result()
    assert usage.data[0].size_bytes >= mine.checkpoint_storage_bytes
