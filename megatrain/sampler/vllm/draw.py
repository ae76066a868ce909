"""One request, as messages to vLLM and back."""

import asyncio
from collections.abc import Sequence
from typing import Any

from megatrain.sampler.types import SampleRequest, SampleResult
from megatrain.sampler.vllm import prompt
from megatrain.sampler.vllm.abilities import Abilities
from megatrain.sampler.vllm.answer import sequences
from megatrain.sampler.vllm.client import Client
from megatrain.sampler.vllm.request import bodies
from megatrain.sampler.vllm.together import together

Answer = dict[str, Any]


class Draw:
    """Draws from the base or from one adapter, by vLLM's name."""

    def __init__(
        self,
        client: Client,
        model: str,
        abilities: Abilities,
        *,
        ends: tuple[int, ...],
        most: int,
        narrow: asyncio.Semaphore,
    ) -> None:
        """`ends`: what ends a text if nothing is said; `most`: sequences of one message; `narrow`
        holds the messages back that ask for one token each."""
        self._client, self._model, self._abilities = client, model, abilities
        self._ends, self._most, self._narrow = ends, most, narrow

    async def sample(self, request: SampleRequest) -> SampleResult:
        """Return all that a request asks for.  Raises DataError, SamplerError."""
        messages = [
            body for _, body in bodies(request, self._model, eos=self._ends, most=self._most)
        ]
        direct = self._direct(request)
        if request.num_samples == 1:
            messages[0]["sampling_params"] |= direct
        elif direct:  # each of the sequences would score the prompt
            messages.append(self._message(request.prompt, prompt.SCORED | direct))
        answers, fields = await self._both(messages, request)
        fields |= self._direct_fields(request, answers[-1])
        if request.num_samples > 1 and direct:
            answers.pop()
        top = request.topk_sample_logprobs
        drawn = [each for answer in answers for each in sequences(answer, top)]
        if request.temperature == 0:  # greedy sequences are alike
            drawn *= request.num_samples
        return SampleResult(drawn, **fields, prompt_cache_hit_tokens=_cached(answers[0]))

    async def _both(
        self, messages: list[Answer], request: SampleRequest
    ) -> tuple[list[Answer], dict[str, Any]]:
        """Send the messages, and what is asked by prefixes, at once."""
        fields: dict[str, Any] = {}

        async def ask_by_prefixes() -> list[Answer]:
            fields.update(await self._by_prefixes(request))
            return []

        drawing = together(map(self._client.generate, messages))
        answers, _ = await together([drawing, ask_by_prefixes()])
        return answers, fields

    def _message(self, tokens: Sequence[int], params: dict[str, Any]) -> dict[str, Any]:
        return {"model": self._model, "token_ids": list(tokens), "sampling_params": params}

    async def _ask(self, tokens: Sequence[int], params: dict[str, Any]) -> Answer:
        async with self._narrow:
            return await self._client.generate(self._message(tokens, params))

    def _direct(self, request: SampleRequest) -> dict[str, Any]:
        """Return the parameters that let one answer tell of the prompt, too."""
        params: dict[str, Any] = {}
        if self._abilities.scores_prompts and prompt.wants_own(request):
            params["prompt_logprobs"] = request.topk_prompt_logprobs
        if self._abilities.scores_ids and prompt.wants_targets(request):
            assert request.target_prompt_tokens is not None
            params |= prompt.target_params(request.target_prompt_tokens)
        return params

    def _direct_fields(self, request: SampleRequest, answer: Answer) -> dict[str, Any]:
        """Return what such an answer tells, by SampleResult's names."""
        fields: dict[str, Any] = {}
        if self._abilities.scores_prompts and prompt.wants_own(request):
            fields |= prompt.own_fields(request, prompt.own_of(request, answer))
        if self._abilities.scores_ids and prompt.wants_targets(request):
            assert request.target_prompt_tokens is not None
            found = prompt.targets_of(request.target_prompt_tokens, answer)
            fields["target_prompt_logprobs"] = found
        return fields

    async def _by_prefixes(self, request: SampleRequest) -> dict[str, Any]:
        """Return what no single answer tells of the prompt, by SampleResult's names."""
        fields: dict[str, Any] = {}
        if not prompt.wants_own(request):
            fields |= prompt.own_fields(request, [])
        elif not self._abilities.scores_prompts:
            own = await prompt.own_by_prefixes(self._ask, request)
            fields |= prompt.own_fields(request, own)
        targets = request.target_prompt_tokens
        if targets is not None and not (self._abilities.scores_ids and targets.size):
            found = await prompt.targets_by_prefixes(self._ask, request.prompt, targets)
            fields["target_prompt_logprobs"] = found
        if request.prompt_alt_tokens_k > 0:
            fields["prompt_alt_tokens"], fields["prompt_alt_logprobs"] = await prompt.alternatives(
                self._ask, request, self._most
            )
        return fields


def _cached(answer: Answer) -> int:
    """Return how many of the prompt's tokens were found in the cache."""
    usage = answer.get("usage") or {}
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
