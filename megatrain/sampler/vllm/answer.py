"""From what vLLM's generate endpoint answers to sequences and tables."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from megatrain.errors import SamplerError
from megatrain.sampler.types import NOTHING, FloatArray, Piece, SampledSequence, TopK
from megatrain.sampler.vllm.client import LostError

LEAST = -9999.0
"""What vLLM writes instead of minus infinity."""

Pairs = Iterable[tuple[int, float]]
"""Tokens and their log-probabilities."""


def sequences(answer: dict[str, Any], num_top: int) -> list[SampledSequence]:
    """Return the sequences of an answer in their order.  Raises SamplerError."""
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    return [
        SampledSequence(
            list(choice["token_ids"]),
            logprobs_of(choice),
            reason_of(choice["finish_reason"]),
            top_of(choice, num_top),
        )
        for choice in choices
    ]


def piece(choice: dict[str, Any], first: int, num_top: int) -> Piece:
    """Return what a stream's message says of one sequence; `first` is the number of its first."""
    reason = choice["finish_reason"]
    return Piece(
        first + choice["index"],
        list(choice["token_ids"]),
        logprobs_of(choice),
        None if reason is None else reason_of(reason),
        top_of(choice, num_top),
    )


def reason_of(reason: str) -> Literal["stop", "length"]:
    """Return why a sequence ended.  Raises LostError if the engine gave it up."""
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise LostError(f"vLLM gave a request up: {reason}")


def logprobs_of(choice: dict[str, Any]) -> FloatArray:
    """Return [len(tokens)] log-probabilities of the tokens that were drawn."""
    return np.array([each["logprob"] for each in _content(choice)], np.float32)


def top_of(choice: dict[str, Any], k: int) -> TopK | None:
    """Return the table of a sequence's tokens; None if none was asked for."""
    if k <= 0:
        return None
    return table([pairs_of(each) for each in _content(choice)], k)


def pairs_of(position: dict[str, Any]) -> list[tuple[int, float]]:
    """Return all tokens that one drawn position tells of."""
    told = [position, *position["top_logprobs"]]
    return [(each["token_id"], each["logprob"]) for each in told]


def _content(choice: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (choice["logprobs"] or {}).get("content") or []
    if len(found) != len(choice["token_ids"]):
        raise SamplerError(
            f"vLLM answered {len(found)} log-probabilities of {len(choice['token_ids'])} tokens"
        )
    return found


def prompt_pairs(answer: dict[str, Any]) -> list[list[tuple[int, float]]]:
    """Return what vLLM says of each prompt position after the first."""
    return [
        [(int(token), float(found["logprob"])) for token, found in position.items()]
        for position in answer["prompt_logprobs"][1:]
    ]


def table(positions: Sequence[Pairs | None], k: int) -> TopK:
    """Return the k most likely of each position's tokens; None leaves a row empty."""
    tokens = np.zeros((len(positions), k), np.int32)
    logprobs = np.full((len(positions), k), NOTHING, np.float32)
    for row, pairs in enumerate(positions):
        best = sorted(dict(pairs or ()).items(), key=lambda pair: -pair[1])[:k]
        for column, (token, logprob) in enumerate(best):
            if logprob > LEAST:
                tokens[row, column], logprobs[row, column] = token, logprob
    return TopK(tokens, logprobs)
