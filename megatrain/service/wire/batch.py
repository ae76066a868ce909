"""Passes as the ranks take them, and their outputs as Tinker's clients know them.

The two count positions differently.  Tinker's position i reads tokens[:i + 1] and predicts
target_tokens[i]; the ranks' position t reads input_ids[:t] and predicts labels[t].  So a datum of N
tokens becomes one of N + 1: its last target is appended, which nothing reads, and position 0 has no
label.  Loss inputs have an entry for each of the N labels.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from megatrain.errors import DataError
from megatrain.service.wire.losses import BOUNDS
from megatrain.service.wire.types import Datum, FloatArray, PassRequest, PassResult
from megatrain.types import IGNORED_LABEL, AdapterBatch, StepOutput

_NAMES = {"logprobs": "old_logps"}
"""The ranks' names for loss inputs, where they differ."""
_FILLS = {"weights": 1.0, "sequence_ratio_mask": 1.0}
"""What data have that lack an input which others have; for weights, all of them."""
TARGETS = "target_tokens"


def to_batch(request: PassRequest, adapter: str) -> AdapterBatch:
    """Return a pass, checked before, as one adapter's share of a pass of the ranks.

    A datum with K targets a position becomes K data, which differ in labels and weights: the sum of
    their losses is its own.
    """
    data = [column for datum in request.data for column in _columns(datum)]
    names = sorted({name for datum in data for name in datum.inputs} - {TARGETS})
    if request.loss_fn == "cross_entropy" and "weights" not in names:
        names.append("weights")
    return AdapterBatch(
        adapter=adapter,
        inputs=[_feature(datum) for datum in data],
        loss_inputs={
            _NAMES.get(name, name): [_column(request, datum, name) for datum in data]
            for name in names
        },
        loss=(request.loss_fn, {"reduction": "sum", **request.loss_config}),
    )


def _columns(datum: Datum) -> list[Datum]:
    """Return a datum with one target a position as it is, one with K of them as K data."""
    targets = datum.inputs[TARGETS]
    if targets.ndim == 1:
        return [datum]
    return [
        Datum(
            datum.tokens,
            {
                name: each[:, column] if each.shape == targets.shape else each
                for name, each in datum.inputs.items()
            },
        )
        for column in range(targets.shape[1])
    ]


def _feature(datum: Datum) -> dict[str, npt.NDArray[np.int64]]:
    targets = datum.inputs[TARGETS]
    return {
        "input_ids": np.append(datum.tokens, targets[-1]).astype(np.int64),
        "labels": np.insert(targets, 0, IGNORED_LABEL).astype(np.int64),
    }


def _column(request: PassRequest, datum: Datum, name: str) -> FloatArray:
    """Return a loss input of a datum, [N]."""
    shape = datum.inputs[TARGETS].shape
    given = datum.inputs.get(name)
    if given is None:
        given = np.full(shape, _fill(request, name), dtype=np.float32)
    elif name in BOUNDS and given.shape != shape:
        given = np.full(shape, given.reshape(-1)[0], dtype=np.float32)
    return np.ascontiguousarray(given, dtype=np.float32)


def _fill(request: PassRequest, name: str) -> float:
    if name in BOUNDS:
        value = request.loss_config.get(name, DEFAULT_BOUNDS[request.loss_fn][BOUNDS.index(name)])
        return float(value)
    return _FILLS[name]


DEFAULT_BOUNDS: Mapping[str, tuple[float, float]] = {
    "ppo": (0.8, 1.2),
    "cispo": (0.0, 4.0),
    "gspo": (1 - 3e-4, 1 + 4e-4),
}
"""The ranks' own, for data without bounds among data that have some."""


def from_output(request: PassRequest, output: StepOutput) -> PassResult:
    """Return what the ranks gave for one adapter's share as its client reads it.

    Raises DataError where the loss is not a finite number.
    """
    loss = output.loss * (output.divisor or 1.0)
    if not math.isfinite(loss):
        raise DataError(
            f"the loss is not finite ({loss}); the gradients are as they were before",
            hint="look at logprobs, advantages and weights, and lower the learning rate",
        )
    rows = iter(output.logps)
    return PassResult(
        outputs=[{"logprobs": _logprobs(rows, datum)} for datum in request.data],
        metrics=_metrics(request, output, loss),
    )


def _logprobs(rows: Iterator[FloatArray], datum: Datum) -> FloatArray:
    """Return a datum's log-probabilities, of the shape of its targets, from the rows that are next.

    The ranks' first position is none of Tinker's.
    """
    shape = datum.inputs[TARGETS].shape
    columns = [next(rows)[1:] for _ in range(1 if len(shape) == 1 else shape[1])]
    result: FloatArray = np.asarray(np.stack(columns, axis=-1), dtype=np.float32).reshape(shape)
    return result


def _metrics(request: PassRequest, output: StepOutput, loss: float) -> Mapping[str, float]:
    """Return metrics, each with one colon before how a client combines it over its requests."""
    metrics = {"loss:sum": float(loss), "tokens:sum": float(request.num_tokens)}
    weights = [np.asarray(d.inputs["weights"]).sum() for d in request.data if "weights" in d.inputs]
    if len(weights) == len(request.data):
        metrics["weights:sum"] = float(sum(weights))
    for name, value in output.statistics.items():
        if math.isfinite(value):
            base, _, reduction = name.partition(":")
            known = reduction in ("mean", "sum", "min", "max")
            key = f"{base}:{reduction}" if known else f"{name.replace(':', '_')}:mean"
            metrics[key] = float(value)
    return metrics
