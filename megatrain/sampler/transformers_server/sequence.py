"""Requests while they are worked on, and the sequences that grow of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from megatrain.sampler.transformers_server.rows import Rows
from megatrain.sampler.transformers_server.stops import Stops
from megatrain.sampler.types import Piece, SampledSequence, SampleRequest, TopK


@dataclass(slots=True, eq=False)
class Job:
    """One request."""

    request: SampleRequest
    answer: Callable[[dict[str, Any]], None]
    """Takes `pieces` (streams), and at the end `result` or `error`."""
    streams: bool
    sequences: list["Sequence"] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    """Fields of SampleResult that tell of the prompt."""
    begun: int = 0
    """Sequences that have their first token."""
    rows: Rows | None = None
    """The prompt's cache, one row, until all sequences have begun."""
    logits: Tensor | None = None
    """[V], of the first new token."""
    cancelled: bool = False

    @property
    def is_done(self) -> bool:
        """Whether all sequences have ended."""
        return all(sequence.stop_reason is not None for sequence in self.sequences)


class Sequence:
    """The index-th sequence of a request."""

    def __init__(self, job: Job, index: int, stops: Stops) -> None:
        self.job, self.index, self._stops = job, index, stops
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.topk: list[tuple[Any, Any]] = []
        self.stop_reason: Any = None
        self._told = 0
        seed = job.request.seed
        entropy = None if seed is None else [seed % (1 << 64), index]
        self._random = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))

    def uniform(self) -> float:
        """Return a number in [0, 1), the next of this sequence's own stream."""
        return float(self._random.random())

    def add(self, token: int, logprob: float) -> None:
        """Take a new token, and see whether it is the last."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self._stops.ends(token):
            self.stop_reason = "stop"
        elif len(self.tokens) >= self.job.request.max_tokens:
            self.stop_reason = "length"

    def sampled(self) -> SampledSequence:
        """Return it as it is answered."""
        logprobs = np.array(self.logprobs, np.float32)
        return SampledSequence(self.tokens, logprobs, self.stop_reason, self._table(0))

    def piece(self) -> Piece | None:
        """Return what was not told yet."""
        start, self._told = self._told, len(self.tokens)
        if start == self._told:
            return None
        logprobs = np.array(self.logprobs[start:], np.float32)
        table = self._table(start)
        return Piece(self.index, self.tokens[start:], logprobs, self.stop_reason, table)

    def _table(self, start: int) -> TopK | None:
        if self.job.request.topk_sample_logprobs <= 0:
            return None
        tokens, logprobs = zip(*self.topk[start:], strict=True)
        return TopK(np.stack(tokens).astype(np.int32), np.stack(logprobs).astype(np.float32))
