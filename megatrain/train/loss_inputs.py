"""What a loss takes beside the data, checked and put on the labels it belongs to."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.errors import DataError
from megatrain.train.loss import Loss, LossInput

Arrays = dict[str, npt.NDArray[Any]]

TEACHER_TOKENS = "teacher_tokens"
"""The input whose tokens' log-probabilities the head computes too (LossBatch.top_logps_NK)."""


def check_names(loss: Loss, names: Any) -> None:
    """Raise DataError for per-call inputs that the loss does not take."""
    unknown = sorted(set(names) - loss.inputs.keys())
    if unknown:
        known = ", ".join(loss.inputs) or "none"
        raise DataError(
            f"{type(loss).__name__} does not take {', '.join(unknown)}; it takes: {known}",
            hint="set_loss chooses the loss; an input without an effect is not accepted",
        )


def check_inputs(
    index: int,
    loss: Loss | None,
    where_L: npt.NDArray[np.int64],
    size: int,
    own: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Arrays:
    """Return the loss's inputs of one datum: (L,), () or (L, K) by name.

    `own` came with the datum, `given` with the call.  Raises DataError for one that is missing,
    given twice, of another length or not finite.
    """
    if loss is None:
        return {}
    result: Arrays = {}
    for name, spec in loss.inputs.items():
        if name in own and name in given:
            raise DataError(f"{name} of datum {index} is given twice: with the datum and the call")
        if name in own or name in given:
            value = own[name] if name in own else given[name]
            result[name] = _array(f"{name} of datum {index}", value, spec, where_L, size)
        elif spec.required:
            raise DataError(
                f"{type(loss).__name__} needs {name}, and datum {index} has none",
                hint=f"pass {name}=[...] to forward_backward, one entry a datum",
            )
    return result


def _array(
    what: str, value: Any, spec: LossInput, where_L: npt.NDArray[np.int64], size: int
) -> npt.NDArray[Any]:
    dtype = np.int64 if spec.integer else np.float32
    try:
        array = np.asarray(value, dtype=dtype)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{what} is not made of numbers: {error}") from error
    # A teacher that gave fewer than K tokens fills up with -inf.
    bad = np.isnan(array) | (array == np.inf) if spec.kind == "top_k" else ~np.isfinite(array)
    if bad.any():
        raise DataError(f"{what} has a value that is not finite")
    if not len(where_L) and not array.size:
        return np.zeros((0, 0) if spec.kind == "top_k" else 0, dtype=dtype)
    if spec.kind == "sequence":
        if array.size != 1:
            raise DataError(f"{what} must be one number: got shape {array.shape}")
        return array.reshape(())
    if spec.kind == "token" and array.ndim == 0:
        return np.full(len(where_L), array, dtype=dtype)
    wanted = 2 if spec.kind == "top_k" else 1
    if array.ndim != wanted or len(array) not in (len(where_L), size):
        raise DataError(
            f"{what} must have one entry for each of {len(where_L)} labels"
            f" (or of {size} input_ids): got shape {array.shape}"
        )
    return array if len(array) == len(where_L) else array[where_L]


def stack_inputs(
    loss: Loss | None, data: list[tuple[int, Mapping[str, npt.NDArray[Any]]]]
) -> Arrays:
    """Return the inputs of several data, (index, inputs) each, as (M,), (S,) or (M, K) by name."""
    result: Arrays = {}
    for name, spec in ({} if loss is None else loss.inputs).items():
        values = [inputs[name] for _, inputs in data if name in inputs]
        if not values:
            continue
        if spec.kind == "top_k":  # a datum without labels has no K
            values = [array for array in values if len(array)] or values[:1]
        result[name] = np.stack(values) if spec.kind == "sequence" else np.concatenate(values)
    return result


def check_alike(
    loss: Loss | None, data: Sequence[tuple[int, Mapping[str, npt.NDArray[Any]]]]
) -> None:
    """Raise DataError for an input that only some data, (index, inputs) each, have, or another K.

    It is asked of the whole batch, so that packing does not decide.
    """
    for name, spec in ({} if loss is None else loss.inputs).items():
        without = [index for index, inputs in data if name not in inputs]
        if without and len(without) < len(data):
            raise DataError(f"{name} must be given for all data or for none: {without} have none")
        if spec.kind == "top_k" and not without:
            widths = {inputs[name].shape[1] for _, inputs in data if len(inputs[name])}
            if len(widths) > 1:
                raise DataError(f"{name} must be equally wide for all data: got {sorted(widths)}")
