"""Answers to other prompts, by which KTO measures how far a policy is from its reference.

Source: TRL's KTOTrainer, which moves the answers of a batch on by one row (_get_kl_dataset).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.types import IGNORED_LABEL

Row = Mapping[str, Any]
Mismatch = dict[str, npt.NDArray[np.int32]]


def mismatches(rows: Iterable[Row], max_length: int) -> Iterator[tuple[Row, Mismatch]]:
    """Yield each row, and its prompt with the answer of the row before it.

    The first row comes last, with the last one's answer.
    """
    first = before = None
    for row in rows:
        if before is None:
            first = row
        else:
            yield row, mismatch(row, before, max_length)
        before = row
    if first is not None and before is not None:
        yield first, mismatch(first, before, max_length)


def mismatch(row: Row, other: Row, max_length: int) -> Mismatch:
    """Return the prompt of `row` with the answer of `other`, cut to `max_length` tokens.

    The prompt is what comes before the first label, the answer everything from there.
    """
    ids, labels = (np.asarray(row[name], dtype=np.int32) for name in ("input_ids", "labels"))
    start, other_start = _first_label(labels), _first_label(other["labels"])
    prompt_labels = np.full(start, IGNORED_LABEL, dtype=np.int32)
    joined = {
        "input_ids": (ids[:start], other["input_ids"][other_start:]),
        "labels": (prompt_labels, other["labels"][other_start:]),
    }
    return {
        name: np.concatenate(parts).astype(np.int32)[:max_length] for name, parts in joined.items()
    }


def _first_label(labels: Sequence[int] | npt.NDArray[np.int32]) -> int:
    return next((i for i, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))
