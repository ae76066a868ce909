"""The trainer as a sampler that draws nothing: it scores prompts, for compute_logprobs."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np

from megatrain.bus.commands import DeleteAdapter, Load
from megatrain.errors import DataError
from megatrain.sampler.types import (
    Piece,
    SampledSequence,
    SampleRequest,
    SampleResult,
    SamplerStatus,
)
from megatrain.service.fleet.fleet import Fleet
from megatrain.service.publish.probe import score

BASE = ""


class TrainerSampler:
    """A Sampler whose engine is the ranks themselves; versions are adapters that nobody trains."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._loaded: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Do nothing: the ranks are there."""

    async def close(self) -> None:
        """Do nothing: the ranks are ended by who started them."""

    async def load_adapter(self, name: str, directory: Path) -> None:
        """Load an adapter onto the ranks.  Raises CheckpointError, ConfigError."""
        if name not in self._loaded:
            self._loaded[name] = asyncio.ensure_future(self._load(name, directory))
        await asyncio.shield(self._loaded[name])

    async def _load(self, name: str, directory: Path) -> None:
        try:
            await self._fleet.do(Load(adapter=name, place=str(directory)))
        except BaseException:
            self._loaded.pop(name, None)
            raise

    async def unload_adapter(self, name: str) -> None:
        """Remove an adapter from the ranks."""
        if self._loaded.pop(name, None) is not None:
            await self._fleet.do(DeleteAdapter(adapter=name))

    async def sample(self, request: SampleRequest) -> SampleResult:
        """Return the prompt's log-probabilities.  Raises DataError for whatever draws tokens."""
        asked = (
            request.max_tokens > 1,
            request.num_samples > 1,
            request.topk_prompt_logprobs > 0,
            request.target_prompt_tokens is not None,
            request.prompt_alt_tokens_k > 0,
        )
        if any(asked) or not request.prompt_logprobs:
            raise DataError(
                "this service has no sampler: only compute_logprobs is answered, by the trainer",
                hint="start it with --sampler transformers",
            )
        nothing = SampledSequence([], np.zeros(0, np.float32), "length")
        return SampleResult([nothing] * request.num_samples, await self.prompt_logprobs(request))

    async def prompt_logprobs(self, request: SampleRequest) -> np.ndarray:
        """Return log-probabilities of a prompt, [len(prompt)], NaN at the first."""
        logprobs = np.full(len(request.prompt), np.nan, dtype=np.float32)
        if len(request.prompt) > 1:
            adapter = request.adapter or BASE
            scored = await score(self._fleet, adapter, request.prompt[:1], request.prompt[1:])
            logprobs[1:] = scored
        if request.prompt_logprobs_last_n is not None:
            logprobs[: len(logprobs) - request.prompt_logprobs_last_n] = np.nan
        return logprobs

    async def stream(self, request: SampleRequest) -> AsyncIterator[Piece]:
        """Raise DataError: nothing is drawn here."""
        result = await self.sample(request)
        for index, each in enumerate(result.sequences):
            yield Piece(index, each.tokens, each.logprobs, each.stop_reason)

    def status(self) -> SamplerStatus:
        """Return how it is."""
        return SamplerStatus("trainer", self._fleet.is_ready, sorted(self._loaded))
