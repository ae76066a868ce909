"""From what set_loss is given to a Loss."""

import inspect
from collections.abc import Mapping
from typing import Any

from megatrain.config.plugins import check_options, resolve
from megatrain.errors import ConfigError
from megatrain.train.loss import Loss
from megatrain.train.losses.function import FunctionLoss


def make_loss(
    spec: Any, options: Mapping[str, Any] | None = None, *, trust_remote_code: bool = False
) -> Loss:
    """Return the loss that `spec` says, with these options.

    `spec` is a subclass of Loss, a function (see FunctionLoss), an instance of a Loss, or a name of
    one of them as `megatrain.config.plugins.resolve` knows it.  An unknown name or option is a
    ConfigError with the nearest known one.
    """
    options = dict(options or {})
    target = resolve("loss", spec, trust_remote_code=trust_remote_code)
    if isinstance(target, Loss):
        if options:
            raise ConfigError(
                f"loss {type(target).__name__} is built already, and takes no options "
                f"{sorted(options)}",
                hint="give the class and its options, or the instance alone",
            )
        return target
    if not inspect.isclass(target):
        return FunctionLoss(target, **options)
    check_options(target, options, what=f"loss {target.__name__}")
    loss: Any = target(**options)
    return loss
