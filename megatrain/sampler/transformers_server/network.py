"""The model that samples: read from its folder, run on prompts and on single steps.

B rows, T columns, V tokens.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from megatrain.sampler.transformers_server.rows import Rows


class Network:
    """Model, tokenizer and what ends a text."""

    def __init__(self, source: str, dtype: str) -> None:
        """Read them from a folder or a hub id."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kind: Any = AutoModelForCausalLM
        self.model = kind.from_pretrained(source, dtype=getattr(torch, dtype)).to(self.device)
        self.model.eval()
        self.config = self.model.config
        self.tokenizer = _tokenizer(source)
        self.eos = _eos(self.model)
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Rows, Tensor, Any]:
        """Return the prompts' rows, logits [B, V] of what follows, and the decoder's output."""
        columns = max(map(len, prompts))
        pads = [columns - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        starts = torch.tensor(pads, device=self.device)[:, None]
        places = torch.arange(columns, device=self.device)
        cache = DynamicCache(config=self.config)
        self._inputs = {
            "input_ids": torch.tensor(ids, device=self.device),
            "position_ids": (places - starts).clamp_min(0),
            "attention_mask": (places >= starts).long() if any(pads) else None,
            "past_key_values": cache,
            "use_cache": True,
        }
        seen: list[Any] = []
        hook = self.model.get_decoder().register_forward_hook(
            lambda module, inputs, output: seen.append(output)
        )
        try:
            logits = self._forward(1)[:, -1]
        finally:
            hook.remove()
        return Rows(cache, pads, columns), logits, seen[0]

    def step(self, rows: Rows, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row; return logits [B, V] of the next one."""
        self._inputs = {
            "input_ids": torch.tensor(tokens, device=self.device)[:, None],
            "position_ids": rows.positions(self.device),
            "attention_mask": rows.mask(self.device),
            "past_key_values": rows.cache,
            "use_cache": True,
        }
        logits = self._forward(1)[:, -1]
        rows.columns += 1
        return logits

    def head(self, output: Any, columns: Tensor) -> Tensor:
        """Return logits [B, len(columns), V] of the last prefill, whose decoder gave `output`."""
        with _answering(self.model.get_decoder(), output):
            return self._forward(columns)

    def _forward(self, keep: int | Tensor) -> Tensor:
        if self._keeps:
            logits: Tensor = self.model(**self._inputs, logits_to_keep=keep).logits
            return logits
        logits = self.model(**self._inputs).logits
        return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]


@contextmanager
def _answering(decoder: Any, output: Any) -> Iterator[None]:
    """Let a decoder give what it gave before: the head then runs alone, as the model runs it."""
    decoder.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del decoder.forward


def _tokenizer(source: str) -> Any | None:
    if Path(source).is_dir() and not any(Path(source).glob("*token*")):
        return None
    return AutoTokenizer.from_pretrained(source)


def _eos(model: Any) -> frozenset[int]:
    for config in (model.generation_config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
