"""What completions and chats have in common: one prompt, asked and answered."""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.errors import DataError
from megatrain.sampler.types import NOTHING, Piece, SampledSequence, SampleRequest, TopK
from megatrain.service.openai.growing_text import GrowingText
from megatrain.service.openai.ports import Target
from megatrain.service.openai.schema import Common
from megatrain.service.openai.text_model import TextModel

Json = dict[str, Any]

LEAST = -9999.0
"""Log-probability that stands for minus infinity, which JSON does not have."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A token that was drawn, as log-probabilities tell it."""

    text: str
    logprob: float
    top: list[tuple[str, float]]
    """Most likely tokens, with log-probabilities."""


def to_request(
    body: Common,
    prompt: tuple[int, ...],
    model: TextModel,
    target: Target,
    *,
    most: int | None,
    top: int,
) -> SampleRequest:
    """Return what is asked of the sampler.

    `most` is the new tokens asked for: None is all that fit.
    `top` is how many likely tokens are told for each.  Raises DataError.
    """
    longest = target.max_context_length
    room = longest - len(prompt)
    if not prompt:
        raise DataError("the prompt has no tokens")
    if room < 1 or (most is not None and most > room):
        raise DataError(
            f"the prompt has {len(prompt)} tokens, and {most or 1} more are asked for; this "
            f"model's context is {longest}",
            hint="shorten the prompt or lower max_tokens",
        )
    if most is not None and most > target.max_new_tokens:
        raise DataError(f"max_tokens must be from 1 to {target.max_new_tokens}, not {most}")
    return SampleRequest(
        prompt=prompt,
        num_samples=body.n,
        max_tokens=min(room, target.max_new_tokens) if most is None else most,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=-1 if body.top_k in (None, 0) else int(body.top_k or -1),
        seed=body.seed,
        # A sampler that gets stop texts ends at nothing else.
        stop=(*body.stops, *model.stops) if body.stops else None,
        topk_sample_logprobs=top,
    )


def scored(model: TextModel, drawn: SampledSequence | Piece, top: int) -> list[Scored]:
    """Return a sequence's tokens with their log-probabilities."""
    told = []
    for at, (token, logprob) in enumerate(zip(drawn.tokens, drawn.logprobs, strict=True)):
        likely = [] if drawn.topk is None else _likely(model, drawn.topk, at)[:top]
        told.append(Scored(_written(model, token), max(float(logprob), LEAST), likely))
    return told


def _likely(model: TextModel, table: TopK, at: int) -> list[tuple[str, float]]:
    cells = zip(table.tokens[at], table.logprobs[at], strict=True)
    return [
        (_written(model, int(token)), max(float(logprob), LEAST))
        for token, logprob in cells
        if logprob != NOTHING
    ]


def _written(model: TextModel, token: int) -> str:
    return model.decode([token], special=True)


def whole_text(model: TextModel, sequence: SampledSequence, stops: Sequence[str]) -> str:
    """Return a sequence's text, without stop strings."""
    return GrowingText(model, stops).add(sequence.tokens, is_last=True)


def usage(num_prompt: int, num_completion: int) -> Json:
    """Return counts of tokens."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


async def events(chunks: AsyncIterator[Json]) -> AsyncIterator[str]:
    """Write chunks as server-sent events, and the end."""
    async for chunk in chunks:
        yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    yield "data: [DONE]\n\n"
