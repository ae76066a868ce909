"""Learning rate schedules by name: Transformers' own, and Megatron's as `default`.

A schedule is a function of the number of steps taken, by which the learning rate of every
parameter group is multiplied.  So that number is all its state.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from megatrain.config.names import check_known
from megatrain.errors import ConfigError

TRANSFORMERS = {
    kind.value: function
    for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()
    if kind.value not in ("reduce_lr_on_plateau", "greedy")
}
"""By the names of transformers.SchedulerType, without those that follow a metric."""
SCHEDULES: dict[str, Callable[..., Any]] = {
    **TRANSFORMERS,
    "ConstantWarmupScheduler": TRANSFORMERS["constant_with_warmup"],
    "LinearWarmupScheduler": TRANSFORMERS["linear"],
    "CosineWarmupScheduler": TRANSFORMERS["cosine"],
}
"""Options are those of Transformers' functions: num_warmup_steps, num_training_steps, ..."""

FAR = 1_000_000
"""Steps behind all counts at which a factor is tried too."""


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    """A factor by number of steps, on every parameter group of an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was; learning rates are then the same, bit for bit."""
        self.last_epoch = int(state_dict["last_epoch"])
        self._step_count = self.last_epoch + 1
        rates = [
            base * factor(self.last_epoch)
            for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, options: Mapping[str, Any]
) -> Schedule:
    """Return a schedule over `optimizer`.

    Raises ConfigError for an unknown name or option, or one that gives no learning rate at some
    step, before a learning rate has changed.
    """
    lr = float(optimizer.defaults["lr"])
    return Schedule(optimizer, _factor(name, lr, options))


def check_schedule(name: str, options: Mapping[str, Any], *, lr: float = 1e-3) -> None:
    """Raise ConfigError for an unknown name or option, given the optimizer's learning rate."""
    _factor(name, lr, options)


def _factor(name: str, lr: float, options: Mapping[str, Any]) -> Callable[[int], float]:
    """Return the factor by step, tried at each step where it may change its form."""
    factor = _make(name, lr, options)
    counts = [value for option, value in options.items() if _is_count(option) and value is not None]
    ends = {0, *counts, sum(counts), FAR + 2 * sum(counts)}
    for step in sorted({step + more for step in ends for more in (-1, 0, 1)} - {-1}):
        _try(name, factor, step, options)
    return factor


def _try(name: str, factor: Callable[[int], float], step: int, options: Mapping[str, Any]) -> None:
    given = f"{name} with {dict(options)}"
    try:
        value = factor(step)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(f"{given} has no learning rate at step {step}: {error}") from error
    if isinstance(value, complex) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{given} would multiply the learning rate at step {step} by {value}")


def _is_count(option: str) -> bool:
    return option.endswith("_steps")


def _check_counts(name: str, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    for option, value in options.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        default = value is None and parameters[option].default is None
        if _is_count(option) and not whole and not default:
            raise ConfigError(f"{name}: {option} must be a whole number, 0 or more: {value!r}")


def _make(name: str, lr: float, options: Mapping[str, Any]) -> Callable[[int], float]:
    if name in ("reduce_lr_on_plateau", "greedy"):
        raise ConfigError(
            f"the scheduler {name!r} follows a metric, and lr_step has none",
            hint="choose one that depends on the number of steps, cosine for example",
        )
    check_known("scheduler", [name], {*SCHEDULES, "default"})
    if name == "default":
        known = set(inspect.signature(_megatron).parameters) - {"lr"}
        check_known("option of default", options, known)
        _check_counts(name, options, _megatron)
        return _call(name, _megatron, options, lr=lr)
    known = set(inspect.signature(SCHEDULES[name]).parameters) - {"optimizer", "last_epoch"}
    check_known(f"option of {name}", options, known)
    _check_counts(name, options, SCHEDULES[name])
    # On an optimizer of its own: making a schedule sets learning rates at once.
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(0))], lr=lr)
    factor: Callable[[int], float] = _call(
        name, SCHEDULES[name], options, optimizer=stand_in
    ).lr_lambdas[0]
    return factor


def _call(name: str, function: Callable[..., Any], options: Mapping[str, Any], **more: Any) -> Any:
    try:
        return function(**more, **options)
    except (TypeError, ValueError, ArithmeticError) as error:
        given = dict(options)
        raise ConfigError(f"{name} does not take these options: {given}: {error}") from error


def _megatron(
    *,
    lr: float,
    lr_decay_steps: int,
    max_lr: float | None = None,
    min_lr: float = 0.0,
    lr_warmup_steps: int = 0,
    lr_warmup_init: float = 0.0,
    lr_decay_style: str = "cosine",
) -> Callable[[int], float]:
    """Return megatron-core's OptimizerParamScheduler as a factor on the optimizer's `lr`.

    Linear warmup from lr_warmup_init to max_lr (the optimizer's lr if None) over lr_warmup_steps,
    then cosine, linear, inverse-square-root or constant, down to min_lr at lr_decay_steps; min_lr
    after that.
    """
    max_lr = lr if max_lr is None else max_lr
    check_known(
        "lr_decay_style",
        [lr_decay_style],
        ["cosine", "linear", "inverse-square-root", "constant"],
    )
    if not 0 <= min_lr <= max_lr or not 0 <= lr_warmup_init <= max_lr or not lr > 0:
        raise ConfigError(
            "default: rates must be 0 <= min_lr, lr_warmup_init <= max_lr, and the optimizer's lr "
            f"positive: min_lr={min_lr}, lr_warmup_init={lr_warmup_init}, max_lr={max_lr}, lr={lr}"
        )
    if not lr_decay_steps > 0 or lr_warmup_steps >= lr_decay_steps:
        raise ConfigError(
            "default: lr_decay_steps must be positive, and more than lr_warmup_steps: "
            f"{lr_decay_steps}, {lr_warmup_steps}"
        )

    def factor(step: int) -> float:
        if lr_warmup_steps > 0 and step <= lr_warmup_steps:
            rate = lr_warmup_init + (max_lr - lr_warmup_init) * step / lr_warmup_steps
        elif lr_decay_style == "constant":
            rate = max_lr
        elif step > lr_decay_steps:
            rate = min_lr
        elif lr_decay_style == "inverse-square-root":
            rate = max(min_lr, max_lr * max(lr_warmup_steps, 1) ** 0.5 / max(step, 1) ** 0.5)
        else:
            done = (step - lr_warmup_steps) / (lr_decay_steps - lr_warmup_steps)
            left = 1 - done if lr_decay_style == "linear" else (math.cos(math.pi * done) + 1) / 2
            rate = min_lr + left * (max_lr - min_lr)
        return rate / lr

    return factor
