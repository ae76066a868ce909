"""Whether a completion has the tags that it was asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatrain.errors import ConfigError
from megatrain.rl.reward import CompletionReward, last_tagged


class FormatReward(CompletionReward):
    """1 if the completion has each of these tags, opened and closed: think and answer."""

    def __init__(self, tags: Sequence[str] = ("think", "answer")) -> None:
        if isinstance(tags, str) or not tags:
            raise ConfigError(f"tags must be a list of names: {tags!r}")
        self.tags = list(tags)

    def score(self, completion: str, truth: Mapping[str, Any]) -> float:
        """Return 1 or 0."""
        return float(all(last_tagged(completion, tag) is not None for tag in self.tags))
