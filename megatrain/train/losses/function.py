"""A loss from a function of one's own."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from megatrain.config.names import nearest
from megatrain.errors import ConfigError
from megatrain.train.loss import Loss, LossBatch, LossInput, Statistics

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class FunctionLoss(Loss):
    """The loss `function(batch, **options, **inputs)`; the mean over labels.

    `function` takes a LossBatch and returns the sum over its labels, a scalar that depends on
    batch.logps_N.  Its other parameters are options, where they are given here, or else inputs of a
    call, (N,) tensors, which may be left out where the parameter has a default.  It is not called
    for a micro-batch without labels.  For another divisor, kind of input, or statistics: a subclass
    of Loss.
    """

    def __init__(self, function: Callable[..., Tensor], **options: Any) -> None:
        parameters = _parameters(function)
        for option in options:
            if option not in parameters:
                known = list(parameters)
                raise ConfigError(
                    f"loss {_name(function)} has no option {option!r}; "
                    f"it has {', '.join(known) or 'none'}",
                    hint=nearest(option, known),
                )
        self.function, self.options = function, options
        self._inputs = {
            name: LossInput(required=parameter.default is inspect.Parameter.empty)
            for name, parameter in parameters.items()
            if name not in options
        }

    @property
    def inputs(self) -> Mapping[str, LossInput]:  # type: ignore[override]
        """The function's parameters that are not options."""
        return self._inputs

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        if not batch.logps_N.numel():
            return batch.logps_N.sum(), {}
        given = {name: batch.inputs[name] for name in self._inputs if name in batch.inputs}
        loss = self.function(batch, **self.options, **given)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(
                f"loss {_name(self.function)} must return a scalar tensor, not {shape}",
                hint="return the sum over labels",
            )
        if batch.logps_N.requires_grad and not loss.requires_grad:
            raise ConfigError(
                f"loss {_name(self.function)} returned a number without gradient",
                hint="compute it from batch.logps_N, without detach() or item()",
            )
        return loss.reshape(()), {}


def _parameters(function: Callable[..., Tensor]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters after the first, by name."""
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise ConfigError(f"loss {_name(function)} must take a LossBatch first")
    others = parameters[1:]
    if any(p.kind not in _NAMED for p in others):
        raise ConfigError(
            f"loss {_name(function)} must name its parameters: no *args, no **kwargs, no '/' after "
            "the first"
        )
    return {parameter.name: parameter for parameter in others}


def _name(function: Callable[..., Tensor]) -> str:
    return getattr(function, "__qualname__", repr(function))
