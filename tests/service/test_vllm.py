"""vLLM, in its own environment and processes, against Transformers' and PEFT's own answers.

Needs `megatrain sampler install --cpu` (or MEGATRAIN_VLLM_HOME), and head_dim 32 or more.
"""

import asyncio
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatrain.errors import ConfigError, DataError
from megatrain.sampler.types import SampleResult
from megatrain.sampler.vllm.sampler import VllmSampler
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
    assert_agrees,
    assert_close,
    logits_of,
    request,
)
from tests.service.vllm_setting import LINEARS, MARKS, Setting

pytestmark = MARKS


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with asyncio.Runner() as runner:
        made = Setting(tmp_path_factory.mktemp("vllm"), runner)
        runner.run(made.sampler.start())
        for name, folder in made.folders.items():
            runner.run(made.sampler.load_adapter(name, folder))
        yield made
        runner.run(made.sampler.close())


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers_with_peft(
    setting: Setting, name: str | None
) -> None:
    (result,) = setting.sample(request(adapter=name, temperature=0.0, num_samples=2))
    model = setting.truth(name)
    out = model.generate(
        input_ids=torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12, eos_token_id=None
    )
    expected = out[0, len(PROMPT) :].tolist()
    assert [each.tokens for each in result.sequences] == [expected, expected]
    assert result.sequences[0].stop_reason == "length"
    logprobs = logits_of(model, (*PROMPT, *expected))[len(PROMPT) - 1 : -1].log_softmax(-1)
    assert_close(result.sequences[0].logprobs, logprobs.max(-1).values)


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


def test_a_seed_gives_the_same_samples_that_differ_from_each_other(setting: Setting) -> None:
    first, again, other = (
        [each.tokens for each in setting.sample(request(num_samples=40, seed=seed))[0].sequences]
        for seed in (7, 7, 8)
    )
    assert first == again
    assert len({tuple(tokens) for tokens in [*first, *other]}) == 80


def test_draws_follow_the_distribution(
    setting: Setting,
) -> None:
    check_draws(setting, 2000)


def test_prompts_of_base_and_adapters_are_scored_together(setting: Setting) -> None:
    prompts = [PROMPT, PROMPT[:4], (*PROMPT, *range(40, 60))]
    asked = [
        request(prompt=prompt, adapter=name, max_tokens=1, prompt_logprobs=True)
        for prompt, name in itertools.product(prompts, NAMES)
    ]
    for result, each in zip(setting.sample(*asked), asked, strict=True):
        logprobs = logits_of(setting.truth(each.adapter), each.prompt)[:-1].log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(each.prompt[1:])[:, None])[:, 0]
        assert result.prompt_logprobs is not None
        assert np.isnan(result.prompt_logprobs[0])
        assert_close(result.prompt_logprobs[1:], own)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_prompt_is_scored_in_every_way(
    setting: Setting, name: str | None, num_samples: int
) -> None:
    targets = np.array([[5, -1], [7, 9]] * 4, np.int64)
    asked = request(
        adapter=name, max_tokens=1, prompt_logprobs=True, prompt_logprobs_last_n=3,
        topk_prompt_logprobs=2, target_prompt_tokens=targets, prompt_alt_tokens_k=3,
        temperature=0.5, num_samples=num_samples,
    )  # fmt: skip
    assert setting.sampler.status().more["scores_prompts"]  # the plug-in is there
    (found,) = setting.sample(asked)
    assert len(found.sequences) == num_samples
    assert_prompt_scored(setting, name, found, targets)


def test_a_text_that_spans_tokens_ends_a_sequence_and_stays_in_it(
    setting: Setting,
) -> None:
    check_text_that_spans_tokens(setting)


def test_token_ids_end_a_sequence_and_stay_in_it(
    setting: Setting,
) -> None:
    check_token_that_ends(setting)


def test_the_models_end_ends_a_sequence_unless_nothing_may(setting: Setting) -> None:
    end = setting.tokenizer.eos_token_id
    # Of the 512 tokens one is the end: a few hundred sequences of 40 meet it.
    asked = {"num_samples": 96, "max_tokens": 40, "temperature": 2.0, "seed": 1}
    free, ended = setting.sample(request(**asked), request(**asked, stop=None))
    assert all(len(each.tokens) == 40 for each in free.sequences)
    met = 0
    for without, with_end in zip(free.sequences, ended.sequences, strict=True):
        if end in without.tokens:
            met += 1
            assert with_end.tokens == without.tokens[: without.tokens.index(end) + 1]
            assert with_end.stop_reason == "stop"
        else:
            assert with_end.tokens == without.tokens
    assert met > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_tells_what_the_whole_request_would(setting: Setting, temperature: float) -> None:
    asked = request(
        num_samples=2, seed=5, adapter="a", temperature=temperature, topk_sample_logprobs=2
    )

    async def collect() -> dict[int, list[int]]:
        found: dict[int, list[int]] = {0: [], 1: []}
        async for piece in setting.sampler.stream(asked):
            found[piece.index] += piece.tokens
            assert piece.topk is not None
            assert len(piece.topk.tokens) == len(piece.tokens) == len(piece.logprobs)
        return found

    (whole,) = setting.sample(asked)
    assert setting.runner.run(collect()) == dict(enumerate(s.tokens for s in whole.sequences))


def test_a_cancelled_request_makes_room(setting: Setting) -> None:
    async def run() -> SampleResult:
        endless = request(num_samples=32, max_tokens=2000)
        task = asyncio.ensure_future(setting.sampler.sample(endless))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.wait([task])
        return await asyncio.wait_for(setting.sampler.sample(request(num_samples=2)), 5)

    assert len(setting.runner.run(run()).sequences) == 2
    assert setting.sampler.status().running == 0


def test_what_cannot_be_drawn_is_refused_by_name(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no adapter 'none'"):
        setting.sample(request(adapter="none"))
    with pytest.raises(DataError, match="512"):
        setting.sample(request(prompt=(5, 512)))
    with pytest.raises(DataError, match=r"0\.01 to 2"):
        setting.sample(request(temperature=2.5))
    with pytest.raises(ConfigError, match="cannot load adapter 'empty'"):
        setting.runner.run(setting.sampler.load_adapter("empty", tmp_path))


def test_adapters_that_were_evicted_answer_again(setting: Setting, tmp_path: Path) -> None:
    """Five adapters where three have room: each is asked twice, with the others between."""
    folders = {f"e{n}": setting.adapter(tmp_path / f"e{n}", 50 + n, LINEARS) for n in range(3)}
    for name, folder in folders.items():
        setting.runner.run(setting.sampler.load_adapter(name, folder))
    for name in [*setting.folders, *folders, *setting.folders, *folders]:
        (result,) = setting.sample(request(adapter=name))
        assert_agrees(setting.truth(name, folders.get(name)), result)
    for name in folders:
        setting.runner.run(setting.sampler.unload_adapter(name))
    assert setting.sampler.status().adapters == ["a", "b"]


class Publishing:
    """Twenty versions follow each other, while base and adapters are sampled all the time."""

    def __init__(self, sampler: VllmSampler, folders: dict[str, Path]) -> None:
        self.sampler, self.folders = sampler, folders
        self.drawn: list[tuple[str | None, SampleResult]] = []
        self._live: str | None = None
        self._is_over = False

    async def run(self) -> None:
        """Load each version, wait for its first sample, and let the one before go."""
        tasks = [asyncio.create_task(self._draw(number)) for number in range(4)]
        unloads = []
        for name, folder in self.folders.items():
            await self.sampler.load_adapter(name, folder)
            old, self._live = self._live, name
            if old is not None:
                unloads.append(asyncio.create_task(self.sampler.unload_adapter(old)))
            while not any(each == name for each, _ in self.drawn):
                await asyncio.sleep(0.01)
        self._is_over = True
        await asyncio.gather(*tasks, *unloads)

    async def _draw(self, number: int) -> None:
        """Draw from the newest version, or, one task of four, from the base."""
        while not self._is_over:
            name = self._live if number else None
            result = await self.sampler.sample(request(adapter=name, max_tokens=6))
            self.drawn.append((name, result))


def test_every_sample_agrees_with_the_version_that_it_names(
    setting: Setting, tmp_path: Path
) -> None:
    targets = [LINEARS, [*LINEARS, "lm_head"]]
    folders = {
        f"v{n}": setting.adapter(tmp_path / f"v{n}", 100 + n, targets[n % 2]) for n in range(20)
    }
    publishing = Publishing(setting.sampler, folders)
    setting.runner.run(publishing.run())
    assert {name for name, _ in publishing.drawn} == {*folders, None}
    for name in (*folders, None):
        model = setting.truth(name, folders.get(str(name)))
        for named, result in publishing.drawn:
            if named == name:
                assert_agrees(model, result)
    setting.runner.run(setting.sampler.unload_adapter("v19"))


def test_an_engine_that_is_killed_comes_back_with_its_adapters(setting: Setting) -> None:
    asked = request(adapter="b", num_samples=2, seed=2, max_tokens=100)
    (before,) = setting.sample(asked)

    async def run() -> SampleResult:
        task = asyncio.ensure_future(setting.sampler.sample(asked))
        await asyncio.sleep(0.1)
        guardian = setting.sampler.status().more["pid"]
        children = Path(f"/proc/{guardian}/task/{guardian}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        return await task

    after = setting.runner.run(run())
    assert [s.tokens for s in after.sequences] == [s.tokens for s in before.sequences]
    assert setting.sampler.status().restarts == 1
    assert setting.sampler.status().adapters == ["a", "b"]
    (other,) = setting.sample(request(adapter="a"))
    assert_agrees(setting.truth("a"), other)
