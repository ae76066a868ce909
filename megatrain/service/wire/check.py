"""Checks of a forward_backward before it is queued, so that a mistake is one client's alone."""

from collections.abc import Mapping

import numpy as np

from megatrain.config.service import Limits
from megatrain.errors import DataError
from megatrain.service.wire.losses import BOUNDS, LOSSES, REFUSED, TinkerLoss
from megatrain.service.wire.types import Array, Datum, PassRequest


def check_pass(
    request: PassRequest, limits: Limits, *, vocab_size: int, max_context_length: int
) -> None:
    """Raise DataError, in one sentence, for what the ranks could not do or would refuse."""
    if not 0 < request.seq_id < 1 << 31:
        raise DataError(f"seq_id must be a number from 1 to 2147483647, not {request.seq_id}")
    loss = loss_named(request.loss_fn)
    _check_config(request.loss_fn, loss, request.loss_config)
    if not 0 < len(request.data) <= limits.max_data:
        raise DataError(f"a request has 1 to {limits.max_data} data, not {len(request.data)}")
    if request.num_tokens > limits.max_request_tokens:
        raise DataError(
            f"{request.num_tokens} tokens in one request are too many: at most"
            f" {limits.max_request_tokens}",
            hint="send the data in several requests; gradients add up until optim_step",
        )
    widths = set()
    for index, datum in enumerate(request.data):
        _check_tokens(f"datum {index}", datum, vocab_size, max_context_length)
        widths.add(_check_targets(index, datum, loss, request.loss_fn, limits, vocab_size))
        _check_inputs(index, datum, loss, request.loss_fn)


def loss_named(name: str) -> TinkerLoss:
    """Return a loss of the table.  Raises DataError, for refused ones with their reason."""
    if name in REFUSED:
        reason, way_out = REFUSED[name]
        raise DataError(reason, hint=way_out)
    if name not in LOSSES:
        raise DataError(f"loss_fn {name[:80]!r} is not known", hint=f"it is one of {list(LOSSES)}")
    return LOSSES[name]


def _check_config(name: str, loss: TinkerLoss, config: Mapping[str, float | str]) -> None:
    for key, value in config.items():
        if key not in loss.options:
            known = ", ".join(loss.options) or "none"
            raise DataError(f"{name} has no option {key[:80]!r}; it has: {known}")
        least, most = loss.options[key]
        if isinstance(value, str) or not least <= value <= most:  # also false for NaN
            raise DataError(f"{key} of {name} must be from {least:g} to {most:g}, not {value!r}")
    low, high = (config.get(key) for key in BOUNDS)
    if isinstance(low, float) and isinstance(high, float) and low > high:
        raise DataError(f"clip_low_threshold {low:g} is above clip_high_threshold {high:g}")


def _check_tokens(what: str, datum: Datum, vocab_size: int, max_context_length: int) -> None:
    if not 0 < len(datum.tokens) <= max_context_length:
        raise DataError(
            f"{what} has {len(datum.tokens)} tokens; this model takes 1 to {max_context_length}"
        )
    check_ids(f"the input of {what}", datum.tokens, vocab_size)


def check_ids(what: str, tokens: Array, vocab_size: int, *, least: int = 0) -> None:
    """Raise DataError for a token id that is not in [least, vocab_size)."""
    if tokens.size and not (least <= tokens.min() and tokens.max() < vocab_size):
        wrong = tokens[(tokens < least) | (tokens >= vocab_size)].flat[0]
        raise DataError(f"{what} holds token {wrong}, and the vocabulary has {vocab_size} tokens")


def _check_targets(
    index: int, datum: Datum, loss: TinkerLoss, name: str, limits: Limits, vocab_size: int
) -> int:
    targets = datum.inputs.get("target_tokens")
    if targets is None:
        raise DataError(f"{name} needs target_tokens, and datum {index} has none")
    what = f"target_tokens of datum {index}"
    if targets.dtype != np.int64:
        raise DataError(f"{what} must be int64, not {targets.dtype}")
    if targets.ndim not in (1, 2) or len(targets) != len(datum.tokens):
        raise DataError(
            f"{what} has shape {list(targets.shape)}, and the input has {len(datum.tokens)} tokens"
        )
    if targets.ndim == 2 and not loss.many_targets:
        raise DataError(f"{what} is two-dimensional, and {name} takes one target a position")
    if targets.ndim == 2 and not 0 < targets.shape[1] <= limits.max_targets:
        raise DataError(f"{what} has {targets.shape[1]} columns, not 1 to {limits.max_targets}")
    check_ids(what, targets, vocab_size)
    return targets.shape[1] if targets.ndim == 2 else 0


def _check_inputs(index: int, datum: Datum, loss: TinkerLoss, name: str) -> None:
    for missing in sorted(loss.required - datum.inputs.keys()):
        raise DataError(f"{name} needs {missing}, and datum {index} has none")
    shape = datum.inputs["target_tokens"].shape
    for key, array in datum.inputs.items():
        if key == "target_tokens":
            continue
        if key not in loss.required | loss.optional:
            raise DataError(
                f"{name} does not take {key[:80]!r}, which datum {index} has",
                hint=f"it takes target_tokens, {', '.join(sorted(loss.required | loss.optional))}",
            )
        allowed = [shape, (1,), ()] if key in BOUNDS else [shape]
        if array.shape not in allowed:
            raise DataError(
                f"{key} of datum {index} has shape {list(array.shape)}, and target_tokens"
                f" {list(shape)}"
            )
        if not np.isfinite(array).all():
            raise DataError(f"{key} of datum {index} has a value that is not finite")
    _check_bounds(index, datum)


def _check_bounds(index: int, datum: Datum) -> None:
    low, high = (datum.inputs.get(key) for key in BOUNDS)
    for key, bound in zip(BOUNDS, (low, high), strict=True):
        if bound is not None and bound.size and bound.min() < 0:
            raise DataError(f"{key} of datum {index} is below 0")
    if low is not None and high is not None and (low > high).any():
        raise DataError(f"clip_low_threshold of datum {index} is above its clip_high_threshold")
