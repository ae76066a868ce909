"""What is asked of a sampler, and what it answers.  No torch."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
IntArray32 = npt.NDArray[np.int32]

NOTHING = -99999.0
"""Log-probability of an empty cell of a top-k table, whose token is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Sequences to draw after one prompt."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    adapter: str | None = None
    """Name of a loaded adapter; None is the base."""
    num_samples: int = 1
    max_tokens: int = 16
    """New tokens of each sequence."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = -1
    """-1 is all."""
    top_p: float = 1.0
    seed: int | None = None
    """With it, the same request gives the same sequences, which differ from each other."""
    stop: tuple[str, ...] | tuple[int, ...] | None = None
    """Texts or token ids that end a sequence, and stay in it.  None: the model's end-of-sequence
    tokens; (): nothing ends it."""
    logprobs: bool = True
    topk_sample_logprobs: int = 0
    """Most likely tokens that are told for each sampled one."""
    prompt_logprobs: bool = False
    """Log-probabilities of the prompt's tokens, at temperature 1."""
    prompt_logprobs_last_n: int | None = None
    """Only the last so many are scored; earlier ones are NaN."""
    topk_prompt_logprobs: int = 0
    target_prompt_tokens: IntArray | None = None
    """[len(prompt) - 1, K] tokens to score; cell [i, j] stands at position i + 1; -1: none."""
    prompt_alt_tokens_k: int = 0
    """Draws, at `temperature`, of each prompt position after the first."""


@dataclass(frozen=True, slots=True)
class TopK:
    """The k most likely tokens of each position."""

    tokens: IntArray32
    """[length, k]; 0 where there is none."""
    logprobs: FloatArray
    """[length, k]; NOTHING where there is none."""


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """One sequence that was drawn."""

    tokens: list[int]
    """New tokens, with what ended them."""
    logprobs: FloatArray
    """[len(tokens)], of the distribution that was sampled from: after temperature, top-k, top-p."""
    stop_reason: Literal["stop", "length"]
    topk: TopK | None = None


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What a request gave."""

    sequences: Sequence[SampledSequence]
    prompt_logprobs: FloatArray | None = None
    """[len(prompt)]; NaN at the first, and where it was not asked for."""
    prompt_topk: TopK | None = None
    target_prompt_logprobs: FloatArray | None = None
    """[len(prompt) - 1, K]; NaN where target_prompt_tokens is -1."""
    prompt_alt_tokens: IntArray32 | None = None
    """[len(prompt) - 1, k]."""
    prompt_alt_logprobs: FloatArray | None = None
    prompt_cache_hit_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that were drawn since the last piece, while a sequence grows."""

    index: int
    """Which of the request's sequences."""
    tokens: list[int]
    logprobs: FloatArray
    stop_reason: Literal["stop", "length"] | None = None
    """Set on a sequence's last piece."""
    topk: TopK | None = None


@dataclass(frozen=True, slots=True)
class SamplerStatus:
    """How an engine is."""

    engine: str
    ready: bool
    adapters: list[str] = field(default_factory=list)
    """Names that are loaded."""
    running: int = 0
    """Sequences that are drawn now."""
    waiting: int = 0
    restarts: int = 0
    error: str = ""
    """Why it is not ready."""
    more: dict[str, Any] = field(default_factory=dict)


class Sampler(Protocol):
    """An engine of one base model, with adapters by name.

    All of it runs on one asyncio loop.  Errors are megatrain.errors: SamplerError for an engine
    that is not there (its caller may try again), ConfigError and DataError for what will not do.
    """

    async def start(self) -> None:
        """Start the engine, and wait until it answers.  Raises SamplerError."""

    async def close(self) -> None:
        """End it; idempotent."""

    async def load_adapter(self, name: str, directory: Path) -> None:
        """Make an adapter in PEFT's format known under a name that was never used before.

        It is loaded again by itself after a restart of the engine or an eviction: the directory
        must stay until unload_adapter has returned.  Raises SamplerError, ConfigError.
        """

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter, once the requests that use it are done."""

    async def sample(self, request: SampleRequest) -> SampleResult:
        """Draw.  Cancelling the task stops the drawing.  Raises DataError, SamplerError."""

    def stream(self, request: SampleRequest) -> AsyncIterator[Piece]:
        """Draw, and tell tokens while they come."""

    def status(self) -> SamplerStatus:
        """Return how it is."""
