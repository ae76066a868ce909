"""What a model says of a prompt's own tokens, asked of vLLM.

Directly: together with the first sequence.  Or by prefixes: the token after each part of the prompt
is the first new one, which costs a request for each, and is right wherever drawing is.  Position i
of what is found here is the prompt's token i + 1; P positions.
"""

import base64
import io
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.errors import SamplerError
from megatrain.sampler.types import FloatArray, SampleRequest
from megatrain.sampler.vllm.answer import pairs_of, prompt_pairs, sequences, table
from megatrain.sampler.vllm.request import seed_of
from megatrain.sampler.vllm.together import together

Ask = Callable[[Sequence[int], dict[str, Any]], Awaitable[dict[str, Any]]]
"""Sends tokens with sampling parameters; returns the answer."""
Table = list[dict[int, float]]
"""Log-probabilities by token, of each position."""

MAX_IDS = 127
"""Tokens that one request tells of by name: vLLM's 128, less one that it may cut off."""
SCORED: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "detokenize": False}


def wants_own(request: SampleRequest) -> bool:
    """Tell whether the prompt's own or most likely tokens are asked for."""
    return len(request.prompt) > 1 and (request.prompt_logprobs or request.topk_prompt_logprobs > 0)


def wants_targets(request: SampleRequest) -> bool:
    """Tell whether given tokens are asked for."""
    return request.target_prompt_tokens is not None and request.target_prompt_tokens.size > 0


def first_position(request: SampleRequest) -> int:
    """Return the first position whose own token is scored."""
    last = len(request.prompt) - 1
    return last - min(request.prompt_logprobs_last_n or last, last)


def own_fields(request: SampleRequest, found: Table) -> dict[str, Any]:
    """Return SampleResult's fields of a table that begins at `first_position`."""
    size, first, k = len(request.prompt), first_position(request), request.topk_prompt_logprobs
    fields: dict[str, Any] = {}
    if request.prompt_logprobs:
        logprobs = np.full(size, np.nan, np.float32)
        for place, told in enumerate(found, first + 1):
            logprobs[place] = told[request.prompt[place]]
        fields["prompt_logprobs"] = logprobs
    if k > 0:
        fields["prompt_topk"] = table([None] * (first + 1) + [t.items() for t in found], k)
    return fields


def own_of(request: SampleRequest, answer: dict[str, Any]) -> Table:
    """Return what a direct answer says of the own tokens and the most likely ones."""
    return [dict(pairs) for pairs in prompt_pairs(answer)[first_position(request) :]]


async def own_by_prefixes(ask: Ask, request: SampleRequest) -> Table:
    """Return the same, asked position by position."""
    prompt, k = request.prompt, request.topk_prompt_logprobs
    places = range(first_position(request), len(prompt) - 1)
    own = await by_prefixes(ask, prompt, places, [[prompt[place + 1]] for place in places])
    if k <= 0:
        return own
    # The token that is drawn comes first, and the list is cut at the number that is asked for.
    params = SCORED | {"logprobs": k + 1}
    answers = await together(ask(prompt[: place + 1], params) for place in places)
    return [dict(_first_token(answer)) | mine for answer, mine in zip(answers, own, strict=True)]


def target_params(targets: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return what asks directly for given tokens of each position, [P, K]; -1 is none."""
    return {"prompt_logprob_token_ids": targets.tolist()}


def targets_of(targets: npt.NDArray[np.int64], answer: dict[str, Any]) -> FloatArray:
    """Return a direct answer's log-probabilities, [P, K], NaN for -1.  Raises SamplerError."""
    data = answer.get("prompt_token_id_logprobs")
    if data is None:
        raise SamplerError("vLLM did not answer with the tokens' log-probabilities")
    found = np.load(io.BytesIO(base64.b64decode(data)), allow_pickle=False).astype(np.float32)
    if found.shape != targets.shape:
        raise SamplerError(f"vLLM scored {found.shape} tokens, not {targets.shape}")
    return np.where(targets < 0, np.float32(np.nan), found)


async def targets_by_prefixes(
    ask: Ask, prompt: Sequence[int], targets: npt.NDArray[np.int64]
) -> FloatArray:
    """Return the same, asked position by position."""
    wanted = [[token for token in row if token >= 0] for row in targets.tolist()]
    places = [place for place, row in enumerate(wanted) if row]
    told = await by_prefixes(ask, prompt, places, [wanted[place] for place in places])
    found = np.full(targets.shape, np.nan, np.float32)
    for place, row in zip(places, told, strict=True):
        for column, token in enumerate(targets[place].tolist()):
            if token >= 0:
                found[place, column] = row[token]
    return found


async def by_prefixes(
    ask: Ask, prompt: Sequence[int], places: Iterable[int], ids: Sequence[Sequence[int]]
) -> Table:
    """Return the log-probabilities of each place's ids after the prompt up to that place."""

    async def score(place: int, wanted: Sequence[int]) -> dict[int, float]:
        distinct = list(dict.fromkeys(wanted))
        parts = [distinct[at : at + MAX_IDS] for at in range(0, len(distinct), MAX_IDS)]
        answers = await together(ask(prompt[: place + 1], _named(part)) for part in parts)
        return {
            token: logprob
            for part, answer in zip(parts, answers, strict=True)
            for token, logprob in _first_token(answer)
            if token in part
        }

    return await together(score(*pair) for pair in zip(places, ids, strict=True))


def _named(ids: Sequence[int]) -> dict[str, Any]:
    # One more than is wanted, since the last one may be cut off; which one it is does not matter.
    extra = next(token for token in range(len(ids) + 1) if token not in ids)
    return SCORED | {"logprobs": len(ids) + 1, "logprob_token_ids": [*ids, extra]}


def _first_token(answer: dict[str, Any]) -> list[tuple[int, float]]:
    return pairs_of(answer["choices"][0]["logprobs"]["content"][0])


async def alternatives(
    ask: Ask, request: SampleRequest, most: int
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """Draw tokens of each position at the request's temperature; return them and their
    log-probabilities, [P, k] each.  `most`: sequences that one message may ask for."""
    k = request.prompt_alt_tokens_k
    total = 1 if request.temperature == 0 else k
    seed = None if request.seed is None else seed_of(request.seed, "prompt ")
    places = range(len(request.prompt) - 1)
    plan = [(place, begin) for place in places for begin in range(0, total, most)]

    def draw(place: int, begin: int) -> Awaitable[dict[str, Any]]:
        params = SCORED | {"temperature": request.temperature, "logprobs": 0}
        params["n"] = min(most, total - begin)
        if seed is not None:
            params["seed"] = seed + place * k + begin
        return ask(request.prompt[: place + 1], params)

    answers = await together(draw(*each) for each in plan)
    tokens, logprobs = np.zeros((len(places), k), np.int32), np.zeros((len(places), k), np.float32)
    for (place, begin), answer in zip(plan, answers, strict=True):
        for column, drawn in enumerate(sequences(answer, 0), begin):
            # Greedy draws are alike: the one stands for all.
            columns = slice(column, None) if total == 1 else column
            tokens[place, columns], logprobs[place, columns] = drawn.tokens[0], drawn.logprobs[0]
    return tokens, logprobs
