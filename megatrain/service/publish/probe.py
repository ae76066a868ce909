"""Asks a sampler for a few tokens, and the trainer what it thinks of them."""

from collections.abc import Sequence

import numpy as np

from megatrain.bus.codec import Failure
from megatrain.bus.commands import ForwardMany
from megatrain.bus.failures import error_of
from megatrain.sampler.types import FloatArray, SampleRequest
from megatrain.service.fleet.fleet import Fleet
from megatrain.types import IGNORED_LABEL, AdapterBatch, StepOutput

PROMPT_TOKENS, NEW_TOKENS = 8, 8
SEED = 20


def probe_request(vocab_size: int, adapter: str | None) -> SampleRequest:
    """Return the request of the probe: a fixed random prompt."""
    prompt = np.random.default_rng(SEED).integers(0, vocab_size, PROMPT_TOKENS)
    return SampleRequest(
        prompt=tuple(int(token) for token in prompt),
        adapter=adapter,
        max_tokens=NEW_TOKENS,
        seed=SEED,
        stop=(),
    )


async def score(
    fleet: Fleet, adapter: str, prompt: Sequence[int], tokens: Sequence[int]
) -> FloatArray:
    """Return the trainer's log-probabilities of `tokens` after `prompt`, [len(tokens)]."""
    ids = np.asarray([*prompt, *tokens], dtype=np.int64)
    labels = ids.copy()
    labels[: len(prompt)] = IGNORED_LABEL
    batch = AdapterBatch(adapter, [{"input_ids": ids, "labels": labels}], loss=CROSS_ENTROPY)
    found = (await fleet.do(ForwardMany(batches=[batch])))[adapter]
    if isinstance(found, Failure):
        raise error_of(found)
    output: StepOutput = found
    return np.asarray(output.logps[0][len(prompt) :], dtype=np.float32)


CROSS_ENTROPY = ("cross_entropy", {"reduction": "sum"})
"""The loss of what is only scored."""
