"""Learning rate schedules by name: Transformers' own, under the names that users know."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from megatrain.errors import ConfigError

SCHEDULES: dict[str, Callable[..., torch.optim.lr_scheduler.LambdaLR]] = {
    "ConstantWarmupScheduler": get_constant_schedule_with_warmup,
    "LinearWarmupScheduler": get_linear_schedule_with_warmup,
    "CosineWarmupScheduler": get_cosine_schedule_with_warmup,
}
"""All take num_warmup_steps; linear and cosine also num_training_steps."""


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, options: dict[str, Any]
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule over `optimizer`.  Raises ConfigError for an unknown name or option."""
    if name not in SCHEDULES:
        raise ConfigError(f"unknown scheduler {name!r}; known: {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[name](optimizer, **options)
    except TypeError as error:
        raise ConfigError(f"{name} does not take these options: {options}: {error}") from error
