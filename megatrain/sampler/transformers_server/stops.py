"""Whether a sequence has come to its end."""

from collections.abc import Sequence
from typing import Any

from megatrain.errors import DataError

CONTEXT = 8
"""Tokens before the first new one that are decoded with it: tokens have a text only together."""


class StopTexts:
    """Looks for texts in what a sequence says, across borders of tokens."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt: Sequence[int]) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self._ids = list(prompt[-CONTEXT:])
        self._start, self._known = 0, len(self._ids)
        self._tail = ""
        self._keep = max(map(len, texts)) - 1

    def add(self, token: int) -> bool:
        """Take a new token; return whether a text is complete now."""
        self._ids.append(token)
        known = self._decode(self._ids[self._start : self._known])
        new = self._decode(self._ids[self._start :])
        # Bytes of a character that is not complete come as the replacement character.
        fresh = new.rstrip("\ufffd")[len(known) :]
        seen = self._tail + fresh
        if any(text in seen for text in self._texts):
            return True
        if not new.endswith("\ufffd"):
            self._start = max(self._start, self._known - CONTEXT)
            self._known = len(self._ids)
            self._tail = seen[len(seen) - self._keep :] if self._keep < len(seen) else seen
        return False

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


class Stops:
    """The ends of one sequence: token ids, or texts."""

    def __init__(
        self,
        stop: tuple[str, ...] | tuple[int, ...] | None,
        prompt: Sequence[int],
        *,
        eos: frozenset[int],
        tokenizer: Any | None,
    ) -> None:
        """Raises DataError for texts where there is no tokenizer."""
        texts = [each for each in stop or () if isinstance(each, str) and each]
        ids = {each for each in stop or () if isinstance(each, int)}
        self._ids = eos if stop is None else frozenset(ids)
        if texts and tokenizer is None:
            raise DataError(
                f"stop texts need a tokenizer, and this model has none: stop={list(texts)}",
                hint="stop at token ids",
            )
        self._texts = StopTexts(tokenizer, texts, prompt) if texts else None

    def ends(self, token: int) -> bool:
        """Take a new token; return whether the sequence ends with it."""
        if token in self._ids:
            return True
        return self._texts is not None and self._texts.add(token)
