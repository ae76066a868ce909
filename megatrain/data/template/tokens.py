"""Characters to tokens: which tokens of a text lie in its labelled spans."""

from collections.abc import Sequence

from megatrain.types import IGNORED_LABEL

Span = tuple[int, int]
"""First character, and the one behind the last."""


def covered(offsets: Sequence[Span]) -> list[Span]:
    """Return the characters that each token stands for, without gaps.

    Some tokenizers leave spaces out of a token's offsets (`trim_offsets`); they belong to the
    token behind them.
    """
    result, behind = [], 0
    for start, end in offsets:
        result.append((min(start, behind), end))
        behind = max(behind, end)
    return result


def labels_of(
    input_ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]
) -> list[int]:
    """Return input_ids where a token has a character in one of `spans`, IGNORED_LABEL elsewhere.

    A token across a border counts, as in Transformers' `return_assistant_tokens_mask`.
    """
    labels, pending = [], sorted(spans)
    for token, (start, end) in zip(input_ids, covered(offsets), strict=True):
        while pending and pending[0][1] <= start:
            pending.pop(0)
        inside = bool(pending) and pending[0][0] < end
        labels.append(token if inside else IGNORED_LABEL)
    return labels


def num_labels(labels: Sequence[int]) -> int:
    """Return how many labels are predicted; the first token is predicted by nothing."""
    return sum(label != IGNORED_LABEL for label in labels[1:])
