"""What the model said before it was trained: log-probabilities for DPO, KTO and their like.

With LoRA the reference is the base, which is there in every step.  A model that is trained as a
whole is its own reference, so all rows are computed before the first step and kept.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megatrain.errors import StateError
from megatrain.train.loss import Loss
from megatrain.types import IGNORED_LABEL, FloatArray, LazyRow

Row = Mapping[str, Any]
BASE = ""
"""Asks forward_only for the base."""


class LossInputs:
    """Computes, for each batch, what the loss takes beside the data."""

    def __init__(self, model: Any, loss: Loss, *, max_length: int) -> None:
        self._model, self._unit, self._max_length = model, loss.unit, max_length
        self._needs_reference = "ref_logps" in loss.inputs
        self._needs_kl = "kl" in loss.inputs
        self._known: dict[bytes, list[FloatArray]] = {}
        self._is_frozen = False

    def prepare(self, batches: Iterable[Sequence[Row]]) -> None:
        """Compute the reference of all these rows; later ones are not computed any more.

        For a model that is trained as a whole, before its first step.  Collective.
        """
        if self._needs_reference:
            for batch in batches:
                self._reference(batch)
        self._is_frozen = True

    def __call__(self, batch: Sequence[Row]) -> dict[str, Any]:
        """Return keyword arguments of forward_backward.  Collective."""
        inputs: dict[str, Any] = {}
        if self._needs_reference:
            inputs["ref_logps"] = self._reference(batch)
        if self._needs_kl:
            inputs["kl"] = [self._kl(batch)] * len(batch)
        return inputs

    def _reference(self, batch: Sequence[Row]) -> list[FloatArray]:
        """Return the reference's log-probabilities of each datum; a row is computed once."""
        keys = [row_key(row) for row in batch]
        missing = {key: row for key, row in zip(keys, batch, strict=True) if key not in self._known}
        if missing and self._is_frozen:
            raise StateError("a row has no reference: it was not there before the first step")
        if missing:
            output = self._model.forward_only(inputs=list(missing.values()), adapter_name=BASE)
            for index, key in enumerate(missing):
                start = index * self._unit
                self._known[key] = output.logps[start : start + self._unit]
        return [logps for key in keys for logps in self._known[key]]

    def _kl(self, batch: Sequence[Row]) -> float:
        """Return the mean over the batch of log(policy / reference) of answers to other prompts.

        TRL's estimate (KTOTrainer): each prompt is given the answer of the row before it.
        Without a second row there is nothing to compare with, and the reference point is 0.
        """
        if len(batch) < 2:
            return 0.0
        rows = [mismatch(row, batch[i - 1], self._max_length) for i, row in enumerate(batch)]
        policy = self._model.forward_only(inputs=rows)
        reference = self._model.forward_only(inputs=rows, adapter_name=BASE)
        pairs = zip(policy.logps, reference.logps, strict=True)
        return float(np.mean([(new - old).sum(dtype=np.float64) for new, old in pairs]))


def mismatch(row: Row, other: Row, max_length: int) -> dict[str, list[int]]:
    """Return the prompt of `row` with the answer of `other`, cut to `max_length` tokens.

    The prompt is what comes before the first label, the answer everything from there.
    """
    ids, labels = list(row["input_ids"]), list(row["labels"])
    start, other_start = _first_label(labels), _first_label(other["labels"])
    ids = [*ids[:start], *list(other["input_ids"])[other_start:]]
    labels = [IGNORED_LABEL] * start + list(other["labels"])[other_start:]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _first_label(labels: Sequence[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))


def row_key(row: Row) -> bytes:
    """Return bytes that say which row this is: its own key, or a hash of its ids and labels."""
    if isinstance(row, LazyRow):
        return str(row.key).encode()
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(row):
        if name.endswith(("input_ids", "labels")):
            digest.update(name.encode() + np.asarray(row[name], dtype=np.int64).tobytes())
    return digest.digest()
