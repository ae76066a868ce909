"""Random batches as a user gives them."""

import random
from typing import Any

Batch = list[dict[str, Any]]

VOCABULARY = 512


def random_batch(size: int, *, seed: int = 0, longest: int = 60) -> Batch:
    """Return data of ragged lengths, the first with one token only; 40 % without a label."""
    rng = random.Random(seed)
    lengths = [1, *(rng.randint(2, longest) for _ in range(size - 1))]
    return [_datum(rng, length) for length in lengths]


def _datum(rng: random.Random, length: int) -> dict[str, Any]:
    ids = [rng.randrange(VOCABULARY) for _ in range(length)]
    return {"input_ids": ids, "labels": [-100 if rng.random() < 0.4 else i for i in ids]}


def num_labels(batch: Batch) -> int:
    """Count labels that are predicted."""
    return sum(label != -100 for datum in batch for label in datum["labels"][1:])
