"""The text of a sequence while its tokens come."""

from collections.abc import Sequence

from megatrain.service.openai.text_model import TextModel


class GrowingText:
    """Tells text as soon as no further token can change it, and never a stop string.

    The last characters are held back while they may be half a character or the beginning of a
    stop string.
    """

    def __init__(self, model: TextModel, stops: Sequence[str]) -> None:
        self._model, self._stops = model, [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._told = 0
        self.is_stopped = False
        """Whether a stop string was met; nothing is told after it."""

    def add(self, tokens: Sequence[int], *, is_last: bool = False) -> str:
        """Return what can be told after further tokens."""
        self._tokens.extend(tokens)
        if self.is_stopped:
            return ""
        text = self._model.decode(self._tokens)
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            text, self.is_stopped = text[: min(found)], True
        elif not is_last:
            text = text[: self._settled(text)]
        said = text[self._told :]
        self._told = max(self._told, len(text))
        return said

    def _settled(self, text: str) -> int:
        end = len(text.rstrip("\ufffd"))
        for stop in self._stops:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text.startswith(stop[:size], end - size):
                    end -= size
                    break
        return end
