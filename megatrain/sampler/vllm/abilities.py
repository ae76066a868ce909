"""What a vLLM server can do, found by asking it: an old or foreign one is not taken at its word."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatrain.errors import ConfigError, DataError
from megatrain.sampler.types import SampleRequest
from megatrain.sampler.vllm import prompt
from megatrain.sampler.vllm.client import Client

logger = logging.getLogger(__name__)

TOKENS = (1, 2, 3, 1, 2)
"""A prompt that every vocabulary has."""
CLOSE = 0.25
"""Difference in log-probability that two ways to ask may have, in bfloat16."""
PLUGIN = "/v1/megatrain"


@dataclass(frozen=True, slots=True)
class Abilities:
    """How prompts may be scored."""

    scores_prompts: bool = False
    """With prompt_logprobs, for every adapter.  vLLM's own code gives an adapter of the head the
    wrong rows, so this needs the plug-in."""
    scores_ids: bool = False
    """Given tokens of each position, with prompt_logprob_token_ids."""


async def find_out(client: Client, base: str) -> Abilities:
    """Ask a server.  Raises ConfigError for one that was not started as it must be."""

    async def ask(tokens: Any, params: dict[str, Any]) -> dict[str, Any]:
        body = {"model": base, "token_ids": list(tokens), "sampling_params": params}
        return await client.generate(body)

    await _check_mode(ask)
    request = SampleRequest(prompt=TOKENS, prompt_logprobs=True)
    truth = await prompt.own_by_prefixes(ask, request)
    own = [told[token] for told, token in zip(truth, TOKENS[1:], strict=True)]
    if await client.get(PLUGIN) is None:
        logger.warning(
            "this vLLM server lacks megatrain's plug-in: prompts are scored a token at a time"
        )
        return Abilities()
    answer = await ask(TOKENS, prompt.SCORED | {"prompt_logprobs": 0})
    direct = [
        told[token] for told, token in zip(prompt.own_of(request, answer), TOKENS[1:], strict=True)
    ]
    return Abilities(_are_close(direct, own, "prompt_logprobs"), await _scores_ids(ask, own))


async def _check_mode(ask: prompt.Ask) -> None:
    params = prompt.SCORED | {"top_k": 1, "logprobs": 0}
    answer = await ask(TOKENS, params)
    logprob = answer["choices"][0]["logprobs"]["content"][0]["logprob"]
    if abs(logprob) > 1e-3:  # the only token that can be drawn
        raise ConfigError(
            "this vLLM server tells log-probabilities of another distribution than it samples from",
            hint="start it with --logprobs-mode processed_logprobs",
        )


async def _scores_ids(ask: prompt.Ask, own: list[float]) -> bool:
    wanted = np.array(TOKENS[1:], np.int64)[:, None]
    try:
        answer = await ask(TOKENS, prompt.SCORED | prompt.target_params(wanted))
    except DataError as error:
        logger.info("given tokens of prompts are scored a position at a time: %s", error.message)
        return False
    found = prompt.targets_of(wanted, answer)[:, 0].tolist()
    return _are_close(found, own, "prompt_logprob_token_ids")


def _are_close(found: list[float], truth: list[float], name: str) -> bool:
    off = max(abs(one - other) for one, other in zip(found, truth, strict=True))
    if off <= CLOSE:
        return True
    logger.warning("vLLM's %s is off by %.3g and is not used", name, off)
    return False
