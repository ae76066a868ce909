"""A user's batch, checked: what comes in is untrusted, what goes on is arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.errors import DataError
from megatrain.types import IGNORED_LABEL, InputFeature

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Datum:
    """One checked datum of S tokens."""

    input_ids_S: Ints
    labels_S: Ints
    """labels[0] never counts; IGNORED_LABEL elsewhere does not either."""
    start: int
    """Where its results start in the flat global result."""

    @property
    def num_labels(self) -> int:
        """Labels that are predicted."""
        return int((self.labels_S[1:] != IGNORED_LABEL).sum())


def check_batch(inputs: Sequence[InputFeature], *, vocab_size: int, train: bool) -> list[Datum]:
    """Return the data as arrays.

    Raises DataError for an empty batch or datum, ids or labels that are no integers in the
    vocabulary, lengths that differ, keys that have no effect, and, to train on, a batch without
    any label.
    """
    if not isinstance(inputs, Sequence) or isinstance(inputs, str | bytes) or not len(inputs):
        raise DataError(
            "a batch must be a list of at least one datum with input_ids and labels: got "
            f"{type(inputs).__name__}"
            + (f" of length {len(inputs)}" if isinstance(inputs, Sequence | Mapping) else "")
        )
    data, start = [], 0
    for index, item in enumerate(inputs):
        data.append(_check_datum(index, item, vocab_size, start))
        start += len(data[-1].input_ids_S)
    if train and not any(datum.num_labels for datum in data):
        raise DataError(
            f"nothing to train on: none of the {len(data)} data has a label after its first token",
            hint=f"labels other than {IGNORED_LABEL} are trained on; the first is never predicted",
        )
    return data


def _check_datum(index: int, item: Any, vocab_size: int, start: int) -> Datum:
    if not isinstance(item, Mapping) or "input_ids" not in item:
        has = sorted(item) if isinstance(item, Mapping) else type(item).__name__
        raise DataError(f"datum {index} has no input_ids; it has {has}")
    _check_keys(index, item)
    ids = _integers(index, "input_ids", item["input_ids"])
    given = item.get("labels")
    labels = ids if given is None else _integers(index, "labels", given)
    if not len(ids):
        raise DataError(f"datum {index} is empty")
    if len(ids) != len(labels):
        raise DataError(
            f"labels must be as long as input_ids: datum {index} has {len(labels)} labels and "
            f"{len(ids)} input_ids"
        )
    _check_range(index, "input_ids", ids, vocab_size)
    _check_range(index, "labels", labels[labels != IGNORED_LABEL], vocab_size)
    return Datum(ids, labels, start)


def _check_keys(index: int, item: Mapping[str, Any]) -> None:
    """Refuse what would have no effect; a mask of ones says nothing and may stay."""
    unknown = sorted(item.keys() - {"input_ids", "labels", "attention_mask"})
    if unknown:
        raise DataError(
            f"datum {index} has keys without an effect: {unknown}",
            hint="a datum is input_ids and labels; data are packed without padding",
        )
    if (
        "attention_mask" in item
        and not (_integers(index, "attention_mask", item["attention_mask"]) == 1).all()
    ):
        raise DataError(
            f"datum {index} is padded: its attention_mask has zeros",
            hint="give each datum without padding; megatrain packs them",
        )


def _integers(index: int, name: str, values: Any) -> Ints:
    """Return a vector of int64; one row of a matrix (as tokenizers return it) is a vector too."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} of datum {index} is no list of integers: {error}") from error
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    empty = array.size == 0
    if array.ndim != 1 or not (empty or np.issubdtype(array.dtype, np.integer)):
        raise DataError(
            f"{name} of datum {index} must be a list of integers: got shape {array.shape} of "
            f"{array.dtype}"
        )
    return array.astype(np.int64)


def _check_range(index: int, name: str, values: Ints, vocab_size: int) -> None:
    wrong = values[(values < 0) | (values >= vocab_size)]
    if len(wrong):
        raise DataError(
            f"{name} of datum {index} must be in [0, {vocab_size}): found {wrong[0]}",
            hint=f"use the model's own tokenizer, and {IGNORED_LABEL} for labels to leave out",
        )
