"""Distributions that tokens are drawn from, and the drawing.

B rows, V tokens.  A row's draw depends on its own logits and its own uniform number alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.sampler.types import SampleRequest

BLOCK = 256
"""Tokens that are summed up before one of them is looked for."""


@dataclass(frozen=True, slots=True)
class Shaping:
    """Temperature, top-k and top-p of several rows."""

    temperature: Tensor
    """[B, 1]; 1 where greedy."""
    greedy: Tensor
    """[B], bool."""
    limited: list[tuple[int, int, float]]
    """Row, top_k (0: all) and top_p of rows that leave out tokens."""

    @classmethod
    def of(cls, requests: Sequence[SampleRequest], device: torch.device) -> "Shaping":
        """Return that of requests, one a row.  Greedy ones ignore top-k and top-p."""
        greedy = [request.temperature == 0 for request in requests]
        heat = [[1.0 if cold else r.temperature] for cold, r in zip(greedy, requests, strict=True)]
        limited = [
            (row, max(request.top_k, 0), request.top_p)
            for row, request in enumerate(requests)
            if not greedy[row] and (request.top_k > 0 or request.top_p < 1)
        ]
        return cls(torch.tensor(heat, device=device), torch.tensor(greedy, device=device), limited)

    def logprobs(self, logits: Tensor) -> Tensor:
        """Return log-probabilities [B, V], float32, of the shaped distributions."""
        shaped = logits.float() / self.temperature
        for row, top_k, top_p in self.limited:
            shaped[row] = _limit(shaped[row], top_k, top_p)
        return torch.log_softmax(shaped, -1)

    def draw(self, logprobs: Tensor, uniforms: Tensor) -> Tensor:
        """Return one token of each row, [B]; uniforms [B], float64, in [0, 1)."""
        best = logprobs.argmax(-1)
        if bool(self.greedy.all()):
            return best
        return torch.where(self.greedy, best, inverse_cdf(logprobs, uniforms))


def _limit(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return logits [V] with -inf for tokens that are left out: first top-k, then top-p."""
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        ordered, indices = logits.sort()
        out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        out[-1] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter(0, indices, out), -torch.inf)
    return logits


def inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token of each row at which the distribution function passes its number.

    Summed in double, block by block: a float32 sum over a large vocabulary would lose rare tokens.
    """
    rows, size = logprobs.shape
    blocks = torch.nn.functional.pad(logprobs.exp(), (0, -size % BLOCK)).view(rows, -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    goal = (uniforms * ends[:, -1])[:, None]
    block = torch.searchsorted(ends, goal, right=True).clamp_max(ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].double()
    place = torch.searchsorted(inside.cumsum(-1), goal - before, right=True)
    # By rounding a number may lie beyond its block's end: then it is the block's last token.
    last = BLOCK - 1 - (inside > 0).flip(-1).int().argmax(-1, keepdim=True)
    return (block * BLOCK + torch.minimum(place, last))[:, 0]
