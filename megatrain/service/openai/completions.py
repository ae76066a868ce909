"""Completions: prompts in, texts out."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from megatrain.errors import DataError, MegatrainError
from megatrain.sampler.types import SampleRequest
from megatrain.service.auth.principal import Principal
from megatrain.service.openai.answer import Scored, scored, to_request, usage, whole_text
from megatrain.service.openai.errors import described
from megatrain.service.openai.growing_text import GrowingText
from megatrain.service.openai.ports import Completer, Target
from megatrain.service.openai.schema import CompletionBody
from megatrain.service.openai.text_model import TextModel

Json = dict[str, Any]

MAX_TOKENS = 16
"""New tokens where a completion does not say, as at OpenAI."""


class Completion:
    """One request for completions."""

    def __init__(
        self, completer: Completer, who: Principal, target: Target, body: CompletionBody
    ) -> None:
        self._completer, self._who, self._target, self._body = completer, who, target, body
        self._top = body.logprobs or 0
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    def asked(self, model: TextModel) -> list[SampleRequest]:
        """Return what is asked of the sampler, for each prompt.  Raises DataError."""
        body = self._body
        if body.echo and body.logprobs is not None:
            raise DataError("echo with logprobs is not supported here", hint="ask for one of them")
        context = self._target.max_context_length
        most = MAX_TOKENS if body.max_tokens is None else body.max_tokens
        return [
            to_request(
                body,
                model.encode(each, context=context) if isinstance(each, str) else tuple(each),
                model,
                self._target,
                most=most,
                top=self._top,
            )
            for each in body.prompts
        ]

    def _echo(self, model: TextModel, at: int) -> str:
        prompt = self._body.prompts[at]
        if not self._body.echo:
            return ""
        return prompt if isinstance(prompt, str) else model.decode(prompt)

    async def answer(self, model: TextModel, requests: list[SampleRequest]) -> Json:
        """Return the whole answer."""
        choices: list[Json] = []
        count = 0
        for at, request in enumerate(requests):
            result = await self._completer.sample(self._who, self._target, request)
            for drawn in result.sequences:
                count += len(drawn.tokens)
                text = self._echo(model, at) + whole_text(model, drawn, self._body.stops)
                told = scored(model, drawn, self._top)
                choices.append(self._choice(len(choices), text, told, 0, drawn.stop_reason))
        total = usage(sum(len(each.prompt) for each in requests), count)
        return {**self._head, "choices": choices, "usage": total}

    async def chunks(self, model: TextModel, requests: list[SampleRequest]) -> AsyncIterator[Json]:
        """Tell the answer while it comes; an error on the way is the last chunk."""
        count = 0
        try:
            for at, request in enumerate(requests):
                async for chunk, size in self._stream(model, at, request):
                    count += size
                    yield chunk
        except MegatrainError as error:
            yield described(error)[1]
            return
        options = self._body.stream_options
        if options is not None and options.include_usage:
            total = usage(sum(len(each.prompt) for each in requests), count)
            yield {**self._head, "choices": [], "usage": total}

    async def _stream(
        self, model: TextModel, at: int, request: SampleRequest
    ) -> AsyncIterator[tuple[Json, int]]:
        """Tell chunks of one prompt, each with its count of tokens."""
        n = self._body.n
        texts = [GrowingText(model, self._body.stops) for _ in range(n)]
        offsets = [0] * n
        begun = [self._echo(model, at)] * n
        async for piece in self._completer.stream(self._who, self._target, request):
            text = texts[piece.index].add(piece.tokens, is_last=piece.stop_reason is not None)
            text, begun[piece.index] = begun[piece.index] + text, ""
            told = scored(model, piece, self._top)
            start = offsets[piece.index]
            choice = self._choice(at * n + piece.index, text, told, start, piece.stop_reason)
            offsets[piece.index] += sum(len(each.text) for each in told)
            yield {**self._head, "choices": [choice]}, len(piece.tokens)

    def _choice(
        self, index: int, text: str, told: list[Scored], start: int, reason: str | None
    ) -> Json:
        logprobs = None if self._body.logprobs is None else _logprobs(told, start)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(told: list[Scored], start: int) -> Json:
    """Return log-probabilities in the format of completions; `start`: characters told before."""
    offsets = []
    for each in told:
        offsets.append(start)
        start += len(each.text)
    return {
        "tokens": [each.text for each in told],
        "token_logprobs": [each.logprob for each in told],
        "top_logprobs": [dict(each.top) for each in told],
        "text_offset": offsets,
    }
