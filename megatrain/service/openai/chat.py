"""Chats: messages in, the assistant's message out."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from megatrain.errors import DataError, MegatrainError
from megatrain.sampler.types import Piece, SampledSequence, SampleRequest
from megatrain.service.auth.principal import Principal
from megatrain.service.openai.answer import Scored, scored, to_request, usage, whole_text
from megatrain.service.openai.errors import described
from megatrain.service.openai.growing_text import GrowingText
from megatrain.service.openai.ports import Completer, Target
from megatrain.service.openai.schema import ChatBody
from megatrain.service.openai.text_model import TextModel
from megatrain.service.openai.tool_calls import OPENING, split_tool_calls

Json = dict[str, Any]


class Chat:
    """One request for an assistant's message."""

    def __init__(
        self, completer: Completer, who: Principal, target: Target, body: ChatBody
    ) -> None:
        self._completer, self._who, self._target, self._body = completer, who, target, body
        self._top = body.top_logprobs or 0
        self._tools = None if body.tool_choice == "none" else body.tools or None
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }

    def asked(self, model: TextModel) -> SampleRequest:
        """Return what is asked of the sampler.  Raises DataError."""
        body = self._body
        if body.top_logprobs is not None and not body.logprobs:
            raise DataError("top_logprobs needs logprobs", hint="set logprobs to true")
        context = self._target.max_context_length
        prompt = model.prompt(
            body.messages, self._tools, body.chat_template_kwargs, context=context
        )
        most = body.max_completion_tokens or body.max_tokens
        return to_request(body, prompt, model, self._target, most=most, top=self._top)

    async def answer(self, model: TextModel, request: SampleRequest) -> Json:
        """Return the whole answer."""
        result = await self._completer.sample(self._who, self._target, request)
        choices = [self._choice(model, at, drawn) for at, drawn in enumerate(result.sequences)]
        count = sum(len(each.tokens) for each in result.sequences)
        total = usage(len(request.prompt), count)
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": total}

    def _choice(self, model: TextModel, index: int, drawn: SampledSequence) -> Json:
        text = whole_text(model, drawn, self._body.stops)
        calls: list[Json] = []
        if self._tools:
            text, calls = split_tool_calls(text)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(scored(model, drawn, self._top)),
            "finish_reason": "tool_calls" if calls else drawn.stop_reason,
        }

    async def chunks(self, model: TextModel, request: SampleRequest) -> AsyncIterator[Json]:
        """Tell the answer while it comes; an error on the way is the last chunk."""
        choices = [
            _Growing(model, self._body.stops, bool(self._tools)) for _ in range(request.num_samples)
        ]
        for index in range(len(choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        count = 0
        try:
            async for piece in self._completer.stream(self._who, self._target, request):
                count += len(piece.tokens)
                delta, reason = choices[piece.index].add(piece)
                told = self._logprobs(scored(model, piece, self._top))
                yield self._chunk(piece.index, delta, told, reason)
        except MegatrainError as error:
            yield described(error)[1]
            return
        options = self._body.stream_options
        if options is not None and options.include_usage:
            total = usage(len(request.prompt), count)
            head = {**self._head, "object": "chat.completion.chunk"}
            yield {**head, "choices": [], "usage": total}

    def _chunk(
        self, index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None
    ) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, told: list[Scored]) -> Json | None:
        """Return log-probabilities in the format of chats."""
        if not self._body.logprobs:
            return None
        content = [
            {
                **_token(each.text, each.logprob),
                "top_logprobs": [_token(text, logprob) for text, logprob in each.top],
            }
            for each in told
        ]
        return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class _Growing:
    """One message while it comes: text at once, tool calls when they are whole."""

    def __init__(self, model: TextModel, stops: tuple[str, ...], has_tools: bool) -> None:
        self._text = GrowingText(model, stops)
        self._has_tools = has_tools
        self._held = ""

    def add(self, piece: Piece) -> tuple[Json, str | None]:
        """Return a delta, and why the message is over, if it is."""
        reason = piece.stop_reason
        text = self._text.add(piece.tokens, is_last=reason is not None)
        if not self._has_tools:
            return {"content": text}, reason
        self._held += text
        if reason is None:
            at = _settled(self._held)
            text, self._held = self._held[:at], self._held[at:]
            return {"content": text}, None
        text, calls = split_tool_calls(self._held)
        if not calls:
            return {"content": text}, reason
        numbered = [{"index": at, **call} for at, call in enumerate(calls)]
        return {"content": text or None, "tool_calls": numbered}, "tool_calls"


def _settled(text: str) -> int:
    """Return how many characters surely stand before any tool call."""
    at = text.find(OPENING)
    if at >= 0:
        return at
    for size in range(min(len(OPENING) - 1, len(text)), 0, -1):
        if text.endswith(OPENING[:size]):
            return len(text) - size
    return len(text)
