"""How a vLLM server that was found is talked to: names, losses, refusals; answers are recorded."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatrain.config.service import SamplerConfig
from megatrain.errors import ConfigError, DataError, SamplerError
from megatrain.sampler.types import SampleRequest
from megatrain.sampler.vllm.client import ABORT, GENERATE
from megatrain.sampler.vllm.sampler import VllmSampler
from tests.fixtures.vllm.server import Said, recorded, serving

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
KEY = "a-key-that-nobody-may-see"
REFUSED, UNKNOWN, _, UNAUTHORISED = recorded("errors.json")


def certain(body: dict[str, Any]) -> dict[str, Any]:
    """Return an answer of which every token is certain, as the first look at a server wants it."""
    params = body["sampling_params"]
    count = params.get("n", 1)
    told = [{"token_id": token, "logprob": 0.0, "rank": 1} for token in range(6)]
    content = [told[0] | {"top_logprobs": told}]
    choice = {"finish_reason": "length", "token_ids": [0], "logprobs": {"content": content}}
    answer: dict[str, Any] = {"choices": [choice | {"index": index} for index in range(count)]}
    if "prompt_logprobs" in params:
        tokens = body["token_ids"][1:]
        answer["prompt_logprobs"] = [None, *({str(t): {"logprob": 0.0}} for t in tokens)]
    return answer


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[Said]:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with serving() as server:
        server.answers |= {
            "/v1/models": lambda body: (200, {"data": [{"id": "base", "parent": None}]}),
            "/v1/megatrain": lambda body: (200, {"plugin": 1}),
            GENERATE: lambda body: (
                REFUSED
                if "prompt_logprob_token_ids" in body["sampling_params"]
                else (200, certain(body))
            ),
            ABORT: lambda body: (200, {}),
            LOAD: lambda body: (200, "done"),
            UNLOAD: lambda body: (200, "done"),
        }
        yield server


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"eos_token_id": 2}')
    return tmp_path / "base"


def adapter(folder: Path, **config: Any) -> Path:
    """Write an adapter's configuration."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, **config}))
    return folder


def run[T](
    said: Said, base: Path, use: Callable[[VllmSampler], Coroutine[Any, Any, T]], **options: Any
) -> T:
    """Return what `use` does with a started sampler."""

    async def main() -> T:
        config = SamplerConfig(engine="vllm", address=said.address, **options)
        sampler = VllmSampler(config, base, is_float32=True, environment=None)
        await sampler.start()
        try:
            return await use(sampler)
        finally:
            await sampler.close()

    return asyncio.run(main())


def request(**values: Any) -> SampleRequest:
    return SampleRequest(**{"prompt": (20, 21, 22), "max_tokens": 3, **values})


def test_every_message_carries_the_key_and_no_error_shows_it(said: Said, base: Path) -> None:
    async def use(sampler: VllmSampler) -> None:
        said.answers[GENERATE] = lambda body: (400, {"error": {"message": "no", "code": 400}})
        with pytest.raises(DataError) as caught:
            await sampler.sample(request())
        assert KEY not in str(caught.value)

    run(said, base, use)
    assert {key for path, _, key in said.told} == {f"Bearer {KEY}"}


def test_an_adapter_gets_a_new_name_each_time_that_it_is_loaded(
    said: Said, base: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "a")

    async def use(sampler: VllmSampler) -> None:
        await sampler.load_adapter("a", folder)
        first = said.bodies(LOAD)[0]["lora_name"]
        known = {first}

        def generate(body: dict[str, Any]) -> Any:
            if body["model"] in known:
                return tuple(UNKNOWN)
            return 200, recorded("sample.json")

        said.answers[GENERATE] = generate
        result = await sampler.sample(request(adapter="a"))  # the server has forgotten it
        assert len(result.sequences) == 2

    run(said, base, use)
    loads = said.bodies(LOAD)
    assert [each["lora_path"] for each in loads] == [str(folder)] * 2
    names = [each["lora_name"] for each in loads]
    assert len(set(names)) == 2
    assert all(name.startswith("a~") for name in names)
    assert not any("load_inplace" in each for each in loads)


def test_an_adapter_that_stays_unknown_is_an_error_in_the_end(
    said: Said, base: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "a")

    async def use(sampler: VllmSampler) -> None:
        await sampler.load_adapter("a", folder)
        said.answers[GENERATE] = lambda body: tuple(UNKNOWN)
        with pytest.raises(SamplerError, match="`nope` does not exist"):
            await sampler.sample(request(adapter="a"))

    run(said, base, use)
    assert len(said.bodies(LOAD)) == 3


def test_an_adapter_goes_when_its_last_request_is_done(
    said: Said, base: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "a")

    async def use(sampler: VllmSampler) -> None:
        await sampler.load_adapter("a", folder)
        over = threading.Event()
        said.answers[GENERATE] = lambda body: (over.wait(10), (200, recorded("sample.json")))[1]
        sample = asyncio.create_task(sampler.sample(request(adapter="a")))
        while GENERATE not in [path for path, body, _ in said.told if body.get("model") != "base"]:
            await asyncio.sleep(0.01)
        unload = asyncio.create_task(sampler.unload_adapter("a"))
        await asyncio.sleep(0.1)
        assert not said.bodies(UNLOAD)
        over.set()
        await asyncio.gather(sample, unload)
        assert said.bodies(UNLOAD) == [{"lora_name": said.bodies(LOAD)[0]["lora_name"]}]
        with pytest.raises(DataError, match="no adapter 'a'"):
            await sampler.sample(request(adapter="a"))

    run(said, base, use)


def test_a_cancelled_request_is_aborted_by_name(said: Said, base: Path) -> None:
    async def use(sampler: VllmSampler) -> None:
        over = threading.Event()
        said.answers[GENERATE] = lambda body: (over.wait(10), (200, certain(body)))[1]
        before = len(said.bodies(GENERATE))
        task = asyncio.create_task(sampler.sample(request()))
        while len(said.bodies(GENERATE)) == before:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        over.set()
        name = said.bodies(GENERATE)[-1]["request_id"]
        assert said.bodies(ABORT) == [{"request_ids": [f"generate-tokens-{name}"]}]

    run(said, base, use)


def test_a_cut_connection_is_no_loss_if_the_server_is_well(said: Said, base: Path) -> None:
    async def use(sampler: VllmSampler) -> None:
        left = [None, None]

        def generate(body: dict[str, Any]) -> Any:
            return (200, left.pop()) if left else (200, recorded("sample.json"))

        said.answers[GENERATE] = generate
        assert len((await sampler.sample(request())).sequences) == 2
        assert sampler.status().restarts == 0

    run(said, base, use)


def test_streams_are_read_as_they_come(said: Said, base: Path) -> None:
    async def use(sampler: VllmSampler) -> None:
        said.answers[GENERATE] = lambda body: (200, recorded("stream.txt"))
        found = [piece async for piece in sampler.stream(request(num_samples=2))]
        assert [(each.index, each.tokens) for each in found] == [
            (0, [501]), (0, [293]), (1, [452]), (1, [128]),
        ]  # fmt: skip
        assert [each.stop_reason for each in found] == [None, "length", None, "length"]
        assert said.bodies(GENERATE)[-1]["stream"] is True
        assert not said.bodies(ABORT)

    run(said, base, use)


def test_a_stream_that_is_left_early_is_aborted(said: Said, base: Path) -> None:
    async def use(sampler: VllmSampler) -> None:
        said.answers[GENERATE] = lambda body: (200, recorded("stream.txt"))
        pieces = sampler.stream(request(num_samples=2))
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]
        assert len(said.bodies(ABORT)) == 1

    run(said, base, use)


def test_a_server_of_another_kind_is_refused_with_what_it_lacks(said: Said, base: Path) -> None:
    async def nothing(sampler: VllmSampler) -> None: ...

    raw = recorded("ids.json")
    said.answers[GENERATE] = lambda body: (200, raw)
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        run(said, base, nothing)
    said.answers[GENERATE] = lambda body: (403, {"error": {"message": "Scale-out is disabled"}})
    with pytest.raises(ConfigError, match="--enable-scale-out"):
        run(said, base, nothing)
    said.answers[GENERATE] = lambda body: tuple(UNAUTHORISED)
    with pytest.raises(ConfigError, match="VLLM_API_KEY"):
        run(said, base, nothing)


@pytest.mark.parametrize("has_plugin", [True, False])
def test_without_the_plug_in_prompts_are_scored_by_prefixes(
    said: Said, base: Path, has_plugin: bool
) -> None:
    if not has_plugin:
        del said.answers["/v1/megatrain"]

    async def use(sampler: VllmSampler) -> int:
        before = len(said.bodies(GENERATE))
        asked = request(prompt=(1, 2, 3, 4), prompt_logprobs=True, max_tokens=1)
        result = await sampler.sample(asked)
        assert result.prompt_logprobs is not None
        assert result.prompt_logprobs[1:].tolist() == [0.0] * 3
        return len(said.bodies(GENERATE)) - before

    assert run(said, base, use) == (1 if has_plugin else 4)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
    ],
)
def test_adapters_that_vllm_would_read_wrongly_are_refused(
    said: Said, base: Path, tmp_path: Path, config: dict[str, Any], match: str
) -> None:
    folder = adapter(tmp_path / "a", **config)

    async def use(sampler: VllmSampler) -> None:
        with pytest.raises(ConfigError, match=match):
            await sampler.load_adapter("a", folder)

    run(said, base, use)
    assert not said.bodies(LOAD)


def test_factors_of_all_experts_in_one_tensor_are_named_as_such(
    said: Said, base: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "a", target_parameters=["mlp.experts.down_proj"])

    async def use(sampler: VllmSampler) -> None:
        await sampler.load_adapter("a", folder)

    run(said, base, use)
    assert said.bodies(LOAD)[0]["is_3d_lora_weight"] is True
