"""What the model said before it was trained: log-probabilities for DPO, KTO and their like.

With LoRA the reference is the base or, where training starts from an adapter, a second copy of it;
both are there in every step.  A model that is trained as a whole is its own reference, so all rows
are computed before the first step and kept.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megatrain.cli.train.kept import MAX_VALUES, Kept
from megatrain.cli.train.mismatch import Mismatch, mismatch, mismatches
from megatrain.errors import StateError
from megatrain.train.loss import Loss
from megatrain.types import FloatArray, LazyRow, StepOutput

Row = Mapping[str, Any]
Batch = Sequence[Row]
BASE = ""
"""Asks forward_only for the base."""


class LossInputs:
    """Computes, for each batch, what the loss takes beside the data."""

    def __init__(
        self,
        model: Any,
        loss: Loss,
        *,
        max_length: int,
        reference: str = BASE,
        max_values: int = MAX_VALUES,
    ) -> None:
        """`reference` is an adapter that is not trained, or the base.

        `max_values` log-probabilities are kept where a row may come again; all by prepare().
        """
        self._model, self._unit, self._max_length = model, loss.unit, max_length
        self._reference_name = reference
        self._needs_reference = "ref_logps" in loss.inputs
        self._needs_kl = "kl" in loss.inputs
        self._known = Kept(max_values)
        self._mismatched: dict[bytes, tuple[Mismatch, float]] = {}
        """By row: its prompt with another answer, and what the reference says of that answer."""
        self._is_frozen = False

    def prepare(self, sources: Iterable[Iterable[Batch]]) -> None:
        """Compute the reference of all rows of each source, in its order, and keep it.

        For a model that is trained as a whole, before its first step: later rows are not computed
        any more.  KTO's answer to another prompt is that of the row before.  Collective.
        """
        for batches in sources:
            for batch in batches if self._needs_reference else ():
                self._reference(batch)
            if self._needs_kl:
                self._fix_mismatches(batches)
        self._is_frozen = True

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Return keyword arguments of forward_backward.  Collective."""
        inputs: dict[str, Any] = {}
        if self._needs_reference:
            inputs["ref_logps"] = self._reference(batch)
        if not self._is_frozen:
            self._known.shrink()
        if self._needs_kl:
            inputs["kl"] = [self._kl(batch)] * len(batch)
        return inputs

    def _reference(self, batch: Batch) -> list[FloatArray]:
        """Return the reference's log-probabilities of each datum; a row that is kept is not asked
        for again.
        """
        keys = [row_key(row) for row in batch]
        missing = {key: row for key, row in zip(keys, batch, strict=True) if key not in self._known}
        if missing and self._is_frozen:
            raise _no_reference()
        if missing:
            output = self._model.forward_only(
                inputs=list(missing.values()), adapter_name=self._reference_name
            )
            for index, key in enumerate(missing):
                start = index * self._unit
                self._known[key] = output.logps[start : start + self._unit]
        return [logps for key in keys for logps in self._known[key]]

    def _fix_mismatches(self, batches: Iterable[Batch]) -> None:
        rows = (row for batch in batches for row in batch)
        for several in itertools.batched(mismatches(rows, self._max_length), PREPARED_AT_ONCE):
            inputs = [each for _, each in several]
            output = self._model.forward_only(inputs=inputs, adapter_name=self._reference_name)
            for (row, each), total in zip(several, _sums(output), strict=True):
                self._mismatched[row_key(row)] = each, total

    def _kl(self, batch: Batch) -> float:
        """Return the mean over the batch of log(policy / reference) of answers to other prompts.

        Each prompt is given the answer of the row before it: in the order of the data if that was
        prepared, as TRL does, else in the batch.  There, without a second row, nothing is to be
        compared with, and the reference point is 0.
        """
        if self._is_frozen:
            fixed = [self._fixed(row) for row in batch]
            rows, reference = [each for each, _ in fixed], [total for _, total in fixed]
        elif len(batch) < 2:
            return 0.0
        else:
            rows = [mismatch(row, batch[i - 1], self._max_length) for i, row in enumerate(batch)]
            reference = _sums(
                self._model.forward_only(inputs=rows, adapter_name=self._reference_name)
            )
        policy = _sums(self._model.forward_only(inputs=rows))
        return float(np.mean(np.subtract(policy, reference)))

    def _fixed(self, row: Row) -> tuple[Mismatch, float]:
        found = self._mismatched.get(row_key(row))
        if found is None:
            raise _no_reference()
        return found


PREPARED_AT_ONCE = 64
"""Answers to other prompts in one pass of the reference."""


def _sums(output: StepOutput) -> list[float]:
    return [float(logps.sum(dtype=np.float64)) for logps in output.logps]


def _no_reference() -> StateError:
    return StateError("a row has no reference: it was not there before the first step")


def row_key(row: Row) -> bytes:
    """Return bytes that say which row this is: its own key, or a hash of its ids and labels."""
    if isinstance(row, LazyRow):
        return str(row.key).encode()
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(row):
        if name.endswith(("input_ids", "labels")):
            digest.update(name.encode() + np.asarray(row[name], dtype=np.int64).tobytes())
    return digest.digest()
