"""What a model says of a prompt's own tokens, at temperature 1.

T positions of the prompt, V tokens.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatrain.sampler.transformers_server.draw import inverse_cdf
from megatrain.sampler.types import NOTHING, SampleRequest, TopK


def is_asked(request: SampleRequest) -> bool:
    """Tell whether anything of the prompt is asked for."""
    return bool(
        request.prompt_logprobs
        or request.topk_prompt_logprobs
        or request.target_prompt_tokens is not None
        or request.prompt_alt_tokens_k
    )


def first_position(request: SampleRequest) -> int:
    """Return the first position whose logits are needed."""
    last_n = request.prompt_logprobs_last_n
    if last_n is None or request.target_prompt_tokens is not None or request.prompt_alt_tokens_k:
        return 0
    return max(0, len(request.prompt) - 1 - last_n)


class Scores:
    """Collects what a request asks of its prompt."""

    def __init__(self, request: SampleRequest) -> None:
        self._request, size = request, len(request.prompt)
        self._first = size - 1 - min(request.prompt_logprobs_last_n or size - 1, size - 1)
        self._next = torch.tensor(request.prompt[1:])
        self._logprobs = np.full(size, np.nan, np.float32)
        k, alts = request.topk_prompt_logprobs, request.prompt_alt_tokens_k
        self._top = TopK(np.zeros((size, k), np.int32), np.full((size, k), NOTHING, np.float32))
        targets = request.target_prompt_tokens
        self._targets = None if targets is None else torch.from_numpy(np.array(targets))
        shape = (0, 0) if targets is None else targets.shape
        self._target_logprobs = np.full(shape, np.nan, np.float32)
        self._alts = np.zeros((size - 1, alts), np.int32)
        self._alt_logprobs = np.zeros((size - 1, alts), np.float32)
        seed = request.seed
        # The prompt's draws have a stream of their own, beside those of the sequences.
        entropy = None if seed is None else [seed % (1 << 64), 1 << 32]
        self._random = np.random.default_rng(np.random.SeedSequence(entropy))

    def take(self, begin: int, logits_TV: Tensor) -> None:
        """Take logits of positions from `begin` on, each of the next token."""
        logits_TV = logits_TV.float()
        logprobs_TV = logits_TV.log_softmax(-1)
        end = begin + len(logits_TV)
        self._take_own(begin, end, logprobs_TV)
        if self._targets is not None:
            wanted = self._targets[begin:end].to(logits_TV.device)
            found = logprobs_TV.gather(-1, wanted.clamp(min=0))
            self._target_logprobs[begin:end] = _array(found.masked_fill(wanted < 0, torch.nan))
        if self._request.prompt_alt_tokens_k:
            self._draw(begin, end, logits_TV)

    def _take_own(self, begin: int, end: int, logprobs_TV: Tensor) -> None:
        skip = max(0, self._first - begin)
        if skip >= end - begin:
            return
        begin, logprobs_TV = begin + skip, logprobs_TV[skip:]
        following = self._next[begin:end, None].to(logprobs_TV.device)
        self._logprobs[begin + 1 : end + 1] = _array(logprobs_TV.gather(-1, following)[:, 0])
        if (k := min(self._request.topk_prompt_logprobs, logprobs_TV.shape[1])) > 0:
            best = logprobs_TV.topk(k)
            self._top.tokens[begin + 1 : end + 1, :k] = _array(best.indices)
            self._top.logprobs[begin + 1 : end + 1, :k] = _array(best.values)

    def _draw(self, begin: int, end: int, logits_TV: Tensor) -> None:
        heat = self._request.temperature
        logprobs_TV = (logits_TV / heat if heat > 0 else logits_TV).log_softmax(-1)
        for column in range(self._request.prompt_alt_tokens_k):
            uniforms = torch.from_numpy(self._random.random(end - begin)).to(logits_TV.device)
            drawn = logprobs_TV.argmax(-1) if heat == 0 else inverse_cdf(logprobs_TV, uniforms)
            self._alts[begin:end, column] = _array(drawn)
            self._alt_logprobs[begin:end, column] = _array(
                logprobs_TV.gather(-1, drawn[:, None])[:, 0]
            )

    def result(self) -> dict[str, Any]:
        """Return what was asked for, by SampleResult's names."""
        request, found = self._request, dict[str, Any]()
        if request.prompt_logprobs:
            found["prompt_logprobs"] = self._logprobs
        if request.topk_prompt_logprobs:
            found["prompt_topk"] = self._top
        if self._targets is not None:
            found["target_prompt_logprobs"] = self._target_logprobs
        if request.prompt_alt_tokens_k:
            found["prompt_alt_tokens"] = self._alts
            found["prompt_alt_logprobs"] = self._alt_logprobs
        return found


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.cpu().numpy()
    return array
