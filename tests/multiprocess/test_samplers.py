"""The Transformers engine, in its own process, against Transformers' and PEFT's own answers."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from megatrain.config.service import SamplerConfig
from megatrain.errors import ConfigError, DataError
from megatrain.sampler.transformers_sampler import TransformersSampler
from megatrain.sampler.types import SampleResult
from tests.fixtures.sampling_checks import (
    assert_prompt_scored,
    check_distribution,
    check_draws,
    check_text_that_spans_tokens,
    check_token_that_ends,
)
from tests.fixtures.sampling_truth import (
    NAMES,
    PROMPT,
    TOLERANCE,
    Engine,
    assert_close,
    logits_of,
    request,
)
from tests.fixtures.small_model import make_small_model

pytestmark = pytest.mark.multiprocess


class Setting(Engine):
    """A base, two adapters, and an engine that has them."""

    def __init__(self, folder: Path, runner: asyncio.Runner) -> None:
        super().__init__(runner)
        self.base = make_small_model(folder / "base")
        self.folders = {name: self.adapter(folder / name, seed) for seed, name in enumerate("ab")}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.base)
        self.sampler = TransformersSampler(
            SamplerConfig(max_adapters=2), self.base, is_float32=True
        )

    def adapter(self, folder: Path, seed: int) -> Path:
        """Write an adapter that matters."""
        torch.manual_seed(seed)
        targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
        config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
        get_peft_model(self.plain(), config).save_pretrained(folder)
        return folder


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with asyncio.Runner() as runner:
        made = Setting(tmp_path_factory.mktemp("samplers"), runner)
        runner.run(made.sampler.start())
        for name, folder in made.folders.items():
            runner.run(made.sampler.load_adapter(name, folder))
        yield made
        runner.run(made.sampler.close())


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers_with_peft(
    setting: Setting, name: str | None
) -> None:
    (result,) = setting.sample(request(adapter=name, temperature=0.0))
    model = setting.truth(name)
    out = model.generate(
        input_ids=torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12, eos_token_id=None
    )
    assert result.sequences[0].tokens == out[0, len(PROMPT) :].tolist()
    assert result.sequences[0].stop_reason == "length"


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.5, -1, 1.0), (1.0, -1, 1.0), (2.0, -1, 1.0), (1.0, 5, 1.0), (1.3, -1, 0.7), (0.8, 20, 0.9)],
)
def test_log_probabilities_are_of_the_distribution_that_was_sampled(
    setting: Setting,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    check_distribution(setting, temperature, top_k, top_p)


def test_what_is_drawn_does_not_depend_on_what_is_drawn_with_it(setting: Setting) -> None:
    requests = [
        request(prompt=PROMPT[: 2 + n], adapter=NAMES[n % 3], seed=n, max_tokens=5 + 3 * n, top_k=9)
        for n in range(6)
    ]
    together = setting.sample(*requests, *(request(num_samples=30, max_tokens=20),))
    for one, among in zip(requests, together, strict=False):
        (alone,) = setting.sample(one)
        assert alone.sequences[0].tokens == among.sequences[0].tokens
        np.testing.assert_allclose(
            alone.sequences[0].logprobs, among.sequences[0].logprobs, rtol=0, atol=TOLERANCE
        )


def test_a_seed_gives_the_same_samples_that_differ_from_each_other(setting: Setting) -> None:
    first, again, other = (
        [each.tokens for each in setting.sample(request(num_samples=4, seed=seed))[0].sequences]
        for seed in (7, 7, 8)
    )
    assert first == again != other
    assert len(set(map(tuple, first))) == 4


def test_draws_follow_the_distribution(
    setting: Setting,
) -> None:
    check_draws(setting, 4000)


def test_the_prompt_is_scored(setting: Setting) -> None:
    targets = np.array([[5, -1], [7, 9]] * 4, np.int64)
    short = request(prompt=PROMPT[:4], adapter="b", max_tokens=1, prompt_logprobs=True)
    asked = request(
        adapter="a", max_tokens=1, prompt_logprobs=True, prompt_logprobs_last_n=3,
        topk_prompt_logprobs=2, target_prompt_tokens=targets, prompt_alt_tokens_k=3,
        temperature=0.5,
    )  # fmt: skip
    long, brief = setting.sample(asked, short)
    assert_prompt_scored(setting, "a", long, targets)
    own = logits_of(setting.truth("b"), PROMPT[:4])[:-1].log_softmax(-1)
    assert brief.prompt_logprobs is not None
    assert np.isnan(brief.prompt_logprobs[0])
    assert_close(brief.prompt_logprobs[1:], own.gather(1, torch.tensor(PROMPT[1:4])[:, None])[:, 0])


def test_a_text_that_spans_tokens_ends_a_sequence_and_stays_in_it(
    setting: Setting,
) -> None:
    check_text_that_spans_tokens(setting)


def test_token_ids_end_a_sequence_and_stay_in_it(
    setting: Setting,
) -> None:
    check_token_that_ends(setting)


def test_a_stream_tells_what_the_whole_request_would(setting: Setting) -> None:
    asked = request(num_samples=2, seed=5, adapter="a")

    async def collect() -> dict[int, list[int]]:
        found: dict[int, list[int]] = {0: [], 1: []}
        async for piece in setting.sampler.stream(asked):
            found[piece.index] += piece.tokens
        return found

    (whole,) = setting.sample(asked)
    assert setting.runner.run(collect()) == dict(enumerate(s.tokens for s in whole.sequences))


def test_a_cancelled_request_makes_room(setting: Setting) -> None:
    async def run() -> SampleResult:
        endless = request(num_samples=64, max_tokens=100_000)
        task = asyncio.ensure_future(setting.sampler.sample(endless))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.wait([task])
        return await setting.sampler.sample(request(num_samples=2))

    assert len(setting.runner.run(run()).sequences) == 2
    assert setting.sampler.status().running == 0


def test_what_cannot_be_drawn_is_refused_by_name(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no adapter 'none'"):
        setting.sample(request(adapter="none"))
    with pytest.raises(DataError, match="ids from 0 to 511"):
        setting.sample(request(prompt=(5, 512)))
    with pytest.raises(ConfigError, match="cannot load adapter 'empty'"):
        setting.runner.run(setting.sampler.load_adapter("empty", tmp_path))


@pytest.mark.slow
def test_an_engine_that_is_killed_comes_back_with_its_adapters(setting: Setting) -> None:
    asked = request(adapter="b", num_samples=2, seed=2, max_tokens=200)
    (before,) = setting.sample(asked)

    async def run() -> SampleResult:
        task = asyncio.ensure_future(setting.sampler.sample(asked))
        await asyncio.sleep(0.05)
        guardian = setting.sampler.status().more["pid"]
        children = Path(f"/proc/{guardian}/task/{guardian}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        return await task

    after = setting.runner.run(run())
    assert [s.tokens for s in after.sequences] == [s.tokens for s in before.sequences]
    assert setting.sampler.status().restarts == 1


@pytest.mark.slow
def test_every_sample_agrees_with_the_version_that_it_names(
    setting: Setting, tmp_path: Path
) -> None:
    folders = {f"v{n}": setting.adapter(tmp_path / f"v{n}", 100 + n) for n in range(20)}
    drawn: list[tuple[str, list[int], npt.NDArray[np.float32]]] = []

    async def draw(name: str) -> None:
        result = await setting.sampler.sample(request(adapter=name, max_tokens=8))
        drawn.extend((name, each.tokens, each.logprobs) for each in result.sequences)

    async def run() -> None:
        old: str | None = None
        tasks: list[asyncio.Task[None]] = []
        for name, folder in folders.items():
            await setting.sampler.load_adapter(name, folder)
            tasks += [asyncio.create_task(draw(each)) for each in (name, old) if each]
            await asyncio.sleep(0.01)
            if old is not None:
                tasks.append(asyncio.create_task(setting.sampler.unload_adapter(old)))
            old = name
        await asyncio.gather(*tasks)

    setting.runner.run(run())
    assert {name for name, *_ in drawn} == set(folders)
    for name, tokens, logprobs in drawn:
        model = setting.truth(name, folders[name])
        logits = logits_of(model, (*PROMPT, *tokens))[len(PROMPT) - 1 : -1]
        chosen = torch.tensor(tokens)[:, None]
        assert_close(logprobs, logits.log_softmax(-1).gather(1, chosen)[:, 0])
