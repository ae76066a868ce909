"""A user's batch, checked: what comes in is untrusted, what goes on is arrays."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.errors import DataError
from megatrain.train.loss import Loss
from megatrain.train.loss_inputs import TEACHER_TOKENS, Arrays, check_alike, check_inputs
from megatrain.types import IGNORED_LABEL, InputFeature, LazyRow

Ints = npt.NDArray[np.int64]

_IDS = frozenset({"input_ids", "labels", "attention_mask", "position_ids", "lengths"})
_SIZES = frozenset({"length", "num_labels"})
"""What encoded rows say about themselves; it is counted here all the same."""


@dataclass(frozen=True, slots=True)
class Content:
    """The checked tokens of one datum: S tokens in one or more sequences, L of them labels."""

    input_ids_S: Ints
    labels_S: Ints
    """IGNORED_LABEL at the start of each sequence too."""
    lengths: tuple[int, ...]
    """Of its sequences; more than one if the datum is packed."""
    inputs: Arrays = field(default_factory=dict)
    """Per-call loss inputs: (L,), () or (L, K)."""

    @property
    def where_L(self) -> Ints:
        """Positions of the labels."""
        return np.flatnonzero(self.labels_S != IGNORED_LABEL)


@dataclass(frozen=True, slots=True)
class Datum:
    """One datum of a batch: its sizes everywhere, its content where it is needed."""

    index: int
    size: int
    num_labels: int
    start: int
    """Where its results start in the flat global result."""
    digest: bytes
    """The same on every rank if the datum is."""
    content: Content | None
    """None if it has not been read yet."""
    row: LazyRow | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Its entries of the call's loss inputs, if it has not been read yet."""


@dataclass(frozen=True, slots=True)
class BatchRules:
    """What a batch is checked against."""

    vocab_size: int
    loss: Loss | None = None
    """Whose inputs the data may bring; None for log-probabilities alone."""
    train: bool = False
    """Labels are needed."""


def check_batch(
    inputs: Sequence[InputFeature],
    rules: BatchRules,
    loss_inputs: Mapping[str, Sequence[Any]] | None = None,
) -> list[Datum]:
    """Return the data as arrays; a LazyRow is only asked for its sizes.

    Raises DataError for an empty batch or datum, ids or labels that are no integers in the
    vocabulary, lengths that differ, keys and loss inputs that have no effect or are missing, and,
    to train on, a batch without any label.
    """
    if not isinstance(inputs, Sequence) or isinstance(inputs, str | bytes) or not len(inputs):
        raise DataError(
            "a batch must be a list of at least one datum with input_ids and labels: got "
            f"{type(inputs).__name__}"
            + (f" of length {len(inputs)}" if isinstance(inputs, Sequence | Mapping) else "")
        )
    columns = _check_columns(len(inputs), loss_inputs or {})
    data: list[Datum] = []
    start = 0
    for index, item in enumerate(inputs):
        given = {name: column[index] for name, column in columns.items()}
        data.append(_make_datum(index, item, rules, given, start))
        start += data[-1].size
    _check_whole(data, rules)
    return data


def _check_columns(size: int, loss_inputs: Mapping[str, Any]) -> dict[str, Any]:
    columns = {name: values for name, values in loss_inputs.items() if values is not None}
    for name, values in columns.items():
        is_list = isinstance(values, Sequence) or getattr(values, "ndim", 0) >= 1
        if not is_list or isinstance(values, str | bytes) or len(values) != size:
            found = len(values) if is_list else type(values).__name__
            raise DataError(f"{name} must have one entry for each of {size} data: got {found}")
    return columns


def _make_datum(
    index: int, item: Any, rules: BatchRules, given: Mapping[str, Any], start: int
) -> Datum:
    if isinstance(item, LazyRow):
        digest = hashlib.blake2b(f"{item.key}:{item.num_tokens}".encode(), digest_size=8)
        for name, value in sorted(given.items()):
            digest.update(name.encode() + np.asarray(value).tobytes())
        return Datum(
            index, item.num_tokens, item.num_labels, start, digest.digest(), None, item, given
        )
    content = read_content(index, item, rules, given)
    size, num_labels = len(content.input_ids_S), len(content.where_L)
    return Datum(index, size, num_labels, start, _digest(content), content)


def _digest(content: Content) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr(content.lengths).encode())
    for values in (content.input_ids_S, content.labels_S, *content.inputs.values()):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.digest()


def _check_whole(data: Sequence[Datum], rules: BatchRules) -> None:
    read = [(datum.index, datum.content.inputs) for datum in data if datum.content is not None]
    check_alike(rules.loss, read)
    scores = rules.loss is not None and rules.loss.uses_scores
    if rules.train and not scores and not any(datum.num_labels for datum in data):
        raise DataError(
            f"nothing to train on: none of the {len(data)} data has a label after its first token",
            hint=f"labels other than {IGNORED_LABEL} are trained on; the first is never predicted",
        )
    unit = 1 if rules.loss is None else rules.loss.unit
    if len(data) % unit:
        raise DataError(
            f"{type(rules.loss).__name__} takes data in groups of {unit}, so their number must be "
            f"a multiple of it: {len(data)}",
            hint="a preference pair is two consecutive data: chosen, rejected",
        )


def read_content(
    index: int, item: Any, rules: BatchRules, given: Mapping[str, Any] | None = None
) -> Content:
    """Return one datum as arrays.  Raises DataError."""
    if not isinstance(item, Mapping) or "input_ids" not in item:
        has = sorted(item) if isinstance(item, Mapping) else type(item).__name__
        raise DataError(f"datum {index} has no input_ids; it has {has}")
    known = {} if rules.loss is None else rules.loss.inputs
    _check_keys(index, item, known.keys())
    ids = _integers(index, "input_ids", item["input_ids"])
    labels = ids if item.get("labels") is None else _integers(index, "labels", item["labels"])
    if not len(ids):
        raise DataError(f"datum {index} is empty")
    if len(ids) != len(labels):
        raise DataError(
            f"labels must be as long as input_ids: datum {index} has {len(labels)} labels and "
            f"{len(ids)} input_ids"
        )
    _check_range(index, "input_ids", ids, rules.vocab_size)
    _check_range(index, "labels", labels[labels != IGNORED_LABEL], rules.vocab_size)
    lengths = _lengths(index, item, len(ids))
    labels = labels.copy()
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORED_LABEL
    content = Content(ids, labels, lengths)
    own = {name: item[name] for name in known if item.get(name) is not None}
    inputs = check_inputs(index, rules.loss, content.where_L, len(ids), own, given or {})
    if TEACHER_TOKENS in inputs:
        _check_teacher(index, inputs[TEACHER_TOKENS], rules.vocab_size)
    if len(lengths) > 1:
        _check_packed(index, rules.loss)
    return Content(ids, labels, lengths, inputs)


def _check_keys(index: int, item: Mapping[str, Any], inputs: Any) -> None:
    """Refuse what would have no effect; a mask of ones says nothing and may stay.

    An encoded row of a dataset, which says its sizes, may have columns of its own.
    """
    unknown = sorted(item.keys() - _IDS - set(inputs))
    if unknown and not item.keys() >= _SIZES:
        raise DataError(
            f"datum {index} has keys without an effect: {unknown}",
            hint="a datum is input_ids and labels, and what the loss takes; set_processor chooses "
            "what else becomes of a row",
        )
    if (
        item.get("attention_mask") is not None
        and not (_integers(index, "attention_mask", item["attention_mask"]) == 1).all()
    ):
        raise DataError(
            f"datum {index} is padded: its attention_mask has zeros",
            hint="give each datum without padding; megatrain packs them",
        )


def _lengths(index: int, item: Mapping[str, Any], size: int) -> tuple[int, ...]:
    """Return lengths of a datum's sequences, from `lengths` or from where positions start anew."""
    lengths = None
    if item.get("lengths") is not None:
        lengths = _integers(index, "lengths", item["lengths"])
        if lengths.sum() != size or (lengths < 1).any():
            raise DataError(
                f"lengths of datum {index} must be positive and sum to its {size} tokens: "
                f"{lengths.tolist()}"
            )
    if item.get("position_ids") is not None:
        positions = _integers(index, "position_ids", item["position_ids"])
        starts = np.append(np.flatnonzero(positions == 0), len(positions))
        found = np.diff(starts)
        expected = np.concatenate([np.arange(n) for n in found]) if len(found) else positions[:0]
        if len(positions) != size or not np.array_equal(expected, positions):
            raise DataError(
                f"position_ids of datum {index} must count 0, 1, 2, ... in each sequence",
                hint="leave position_ids out; megatrain counts them itself",
            )
        if lengths is not None and not np.array_equal(lengths, found):
            raise DataError(f"lengths and position_ids of datum {index} contradict each other")
        lengths = found
    return (size,) if lengths is None else tuple(int(n) for n in lengths)


def _check_teacher(index: int, tokens_LK: Ints, vocab_size: int) -> None:
    _check_range(index, TEACHER_TOKENS, tokens_LK.ravel(), vocab_size)
    in_order = np.sort(tokens_LK, axis=1)
    if (in_order[:, 1:] == in_order[:, :-1]).any():
        raise DataError(
            f"{TEACHER_TOKENS} of datum {index} has a token twice for one label",
            hint="give each label K different tokens; fill up with others at -inf",
        )


def _check_packed(index: int, loss: Loss | None) -> None:
    if loss is None:
        return
    if (
        loss.by_sequence
        or loss.unit > 1
        or loss.uses_scores
        or any(each.kind == "sequence" for each in loss.inputs.values())
    ):
        raise DataError(
            f"{type(loss).__name__} counts sequences, and datum {index} is several in one",
            hint="give the sequences one by one; megatrain packs them itself",
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
