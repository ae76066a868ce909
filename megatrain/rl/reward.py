"""What a completion is worth: the base class, and what it reads from a trajectory."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from megatrain.errors import DataError

Trajectories = Sequence[Mapping[str, Any]]


class Reward(ABC):
    """Scores trajectories: messages that end with the assistant's, and what is true in user_data.

    Whatever a model writes, a call returns a number; a bad answer is worth 0.
    """

    @abstractmethod
    def __call__(
        self, trajectories: Trajectories, ground_truths: Sequence[Any] | None = None
    ) -> list[float]:
        """Return one reward a trajectory.  `ground_truths`, if not empty, stand for user_data."""


class CompletionReward(Reward):
    """A reward that looks at one completion at a time: subclass and define `score`."""

    @abstractmethod
    def score(self, completion: str, truth: Mapping[str, Any]) -> float:
        """Return the reward of the assistant's last message; `truth` is the row's user_data."""

    def __call__(
        self, trajectories: Trajectories, ground_truths: Sequence[Any] | None = None
    ) -> list[float]:
        """Return one reward a trajectory.  Raises DataError if there are fewer ground truths."""
        truths = [user_data(each) for each in trajectories]
        if ground_truths:
            if len(ground_truths) != len(trajectories):
                raise DataError(
                    f"one ground truth a trajectory: {len(ground_truths)}, {len(trajectories)}"
                )
            truths = [_truth(each) for each in ground_truths]
        return [
            float(self.score(completion_text(each), truth))
            for each, truth in zip(trajectories, truths, strict=True)
        ]


def completion_text(trajectory: Mapping[str, Any]) -> str:
    """Return the text of the last assistant message; empty if there is none."""
    for message in reversed(trajectory.get("messages") or []):
        if message.get("role") == "assistant":
            return _text(message.get("content"))
    return ""


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else []
    texts = (part.get("text") for part in parts if isinstance(part, Mapping))
    return "".join(text for text in texts if isinstance(text, str))


def last_tagged(text: str, tag: str) -> str | None:
    """Return what the last `<tag>...</tag>` holds; None if there is none.

    Takes time linear in the text, as a lazy regular expression does not on many open tags.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if start < 0:
        return None
    start += len(opening)
    return text[start : text.find(closing, start)]


def user_data(trajectory: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's user_data as one dict: given as a dict, a list of dicts, or of pairs."""
    found = trajectory.get("user_data") or []
    entries = [found] if isinstance(found, Mapping) else found
    result: dict[str, Any] = {}
    for entry in entries if isinstance(entries, list | tuple) else []:
        if isinstance(entry, Mapping):
            result |= entry
        elif isinstance(entry, list | tuple) and len(entry) == 2:
            result[str(entry[0])] = entry[1]
    return result


def _truth(truth: Any) -> dict[str, Any]:
    if not isinstance(truth, Mapping):
        return {"ground_truth": truth}
    if "messages" not in truth:
        return user_data(truth) or dict(truth)
    return user_data(truth) or {"ground_truth": completion_text(truth)}
