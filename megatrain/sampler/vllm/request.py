"""From a SampleRequest to what vLLM's generate endpoint is sent: token ids, never a text."""

import hashlib
from collections.abc import Iterator
from typing import Any

from megatrain.errors import DataError
from megatrain.sampler.types import SampleRequest

LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 0.01, 2.0
"""vLLM raises what is below the first without a word, and refuses what is above the second."""


def check(request: SampleRequest, *, reads_texts: bool) -> None:
    """Raise DataError for what vLLM would do differently, or not at all.

    `reads_texts`: whether there is a tokenizer.
    """
    heat = request.temperature
    if heat != 0 and not LEAST_TEMPERATURE <= heat <= GREATEST_TEMPERATURE:
        raise DataError(
            f"vLLM's temperatures are 0 and {LEAST_TEMPERATURE} to {GREATEST_TEMPERATURE:g}: "
            f"{heat:g}",
            hint="temperature 0 is greedy",
        )
    if not request.prompt:
        raise DataError("a prompt is at least one token")
    texts = [each for each in request.stop or () if isinstance(each, str) and each]
    if texts and not reads_texts:
        raise DataError(
            f"stop texts need a tokenizer, and this model has none: stop={texts}",
            hint="stop at token ids",
        )


def bodies(
    request: SampleRequest, model: str, *, eos: tuple[int, ...], most: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give the messages that draw a request's sequences, each with the number of its first one.

    `model`: vLLM's name of the base or the adapter; `eos`: what ends a text if nothing is said;
    `most`: sequences that one message may ask for.  Greedy sequences are alike: one is drawn.
    """
    total = 1 if request.temperature == 0 else request.num_samples
    for first in range(0, total, most):
        params = sampling_params(request, eos) | {"n": min(most, total - first)}
        if request.seed is not None:
            params["seed"] = seed_of(request.seed) + first
        yield first, {"model": model, "token_ids": list(request.prompt), "sampling_params": params}


def sampling_params(request: SampleRequest, eos: tuple[int, ...]) -> dict[str, Any]:
    """Return vLLM's SamplingParams of a request's sequences, without their number and seed."""
    top = request.topk_sample_logprobs
    ends = eos if request.stop is None else request.stop
    texts = [each for each in ends if isinstance(each, str) and each]
    params = {
        "temperature": request.temperature,
        "top_k": max(request.top_k, 0),
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        # vLLM puts the token that was drawn first, and cuts the list at this number.
        "logprobs": top + 1 if top > 0 else 0,
        # What ends a text is told by us: vLLM would add what it finds in several files.
        "ignore_eos": True,
        "stop_token_ids": [each for each in ends if isinstance(each, int)],
        "detokenize": bool(texts),
    }
    if texts:
        params |= {
            "stop": texts,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        }
    return params


def seed_of(seed: int, use: str = "") -> int:
    """Return the seed of a request's first sequence; vLLM counts on from there.

    Neighbouring seeds must not share sequences, so they are strewn over 62 bits.
    """
    return int.from_bytes(hashlib.sha256(f"{use}{seed}".encode()).digest()[:8]) >> 2
