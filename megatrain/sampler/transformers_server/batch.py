"""Sequences that are drawn together, a token each at a time."""

from collections.abc import Sequence as Series

import torch
from torch import Tensor

from megatrain.sampler.transformers_server.adapters import Adapters
from megatrain.sampler.transformers_server.draw import Shaping
from megatrain.sampler.transformers_server.network import Network
from megatrain.sampler.transformers_server.rows import Rows, join
from megatrain.sampler.transformers_server.sequence import Sequence
from megatrain.sampler.types import NOTHING


class Batch:
    """Rows of one cache with their sequences."""

    def __init__(self, network: Network, adapters: Adapters) -> None:
        self._network, self._adapters = network, adapters
        self._rows: Rows | None = None
        self.sequences: list[Sequence] = []
        self._shaping: Shaping | None = None

    def add(self, rows: Series[Rows], sequences: Series[Sequence]) -> None:
        """Let sequences join, each with one row, whose last token is not in the cache yet."""
        own = [self._rows] if self._rows is not None else []
        self._rows = join([*own, *rows], self._network.config)
        self.sequences += sequences
        self._shaping = None

    def step(self) -> None:
        """Draw one token of each."""
        assert self._rows is not None
        self._adapters.use([sequence.job.request.adapter for sequence in self.sequences])
        logits = self._network.step(self._rows, [each.tokens[-1] for each in self.sequences])
        if self._shaping is None:
            self._shaping = shaping(self.sequences, self._network.device)
        take(self.sequences, logits, self._shaping)

    def prune(self) -> list[Sequence]:
        """Let sequences leave that have ended or are cancelled; return them."""
        stay = [
            number
            for number, each in enumerate(self.sequences)
            if each.stop_reason is None and not each.job.cancelled
        ]
        if len(stay) == len(self.sequences):
            return []
        gone = [each for number, each in enumerate(self.sequences) if number not in set(stay)]
        self._shaping = None
        self.sequences = [self.sequences[number] for number in stay]
        if not stay:
            self._rows = None
        elif self._rows is not None:
            self._rows = self._rows.select(stay, self._network.config)
        return gone

    def split(self) -> dict[str | None, "Batch"]:
        """Return batches of one adapter each, for a model that does not take them together."""
        parts: dict[str | None, Batch] = {}
        for number, sequence in enumerate(self.sequences):
            assert self._rows is not None
            name = sequence.job.request.adapter
            part = parts.setdefault(name, Batch(self._network, self._adapters))
            part.add([self._rows.select([number], self._network.config)], [sequence])
        return parts


def shaping(sequences: Series[Sequence], device: torch.device) -> Shaping:
    """Return temperature, top-k and top-p of sequences."""
    return Shaping.of([sequence.job.request for sequence in sequences], device)


def take(sequences: Series[Sequence], logits: Tensor, shape: Shaping) -> None:
    """Draw a token of each sequence from logits [B, V], and append it."""
    logprobs = shape.logprobs(logits)
    uniforms = torch.tensor([each.uniform() for each in sequences], dtype=torch.float64)
    tokens = shape.draw(logprobs, uniforms.to(logits.device))
    chosen = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    for row, sequence in enumerate(sequences):
        if (k := sequence.job.request.topk_sample_logprobs) > 0:
            sequence.topk.append(_best(logprobs[row], k))
    for sequence, token, logprob in zip(sequences, tokens.tolist(), chosen, strict=True):
        sequence.add(token, logprob)


def _best(logprobs: Tensor, k: int) -> tuple[object, object]:
    """Return the k most likely tokens and their log-probabilities, filled where there are none."""
    best = logprobs.topk(min(k, len(logprobs)))
    none = best.values.isinf()
    tokens = best.indices.masked_fill(none, 0)
    values = best.values.masked_fill(none, NOTHING)
    short = k - len(tokens)
    pad = torch.nn.functional.pad
    return (
        pad(tokens, (0, short)).cpu().numpy(),
        pad(values, (0, short), value=NOTHING).cpu().numpy(),
    )
