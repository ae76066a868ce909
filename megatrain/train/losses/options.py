"""Checks of losses' options: ConfigError with the rule and the value."""

import math
from collections.abc import Sequence
from typing import Any

from megatrain.config.names import nearest
from megatrain.errors import ConfigError


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise ConfigError unless `value` is a finite number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, not {value!r}")
    if not (at_least <= value <= at_most and above < value < below):
        raise ConfigError(f"{name} must be {_range(at_least, above, at_most, below)}: {value}")


def _range(at_least: float, above: float, at_most: float, below: float) -> str:
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if abs(bound) < 1e300)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(
            f"{name} must be one of {', '.join(choices)}, not {value!r}",
            hint=nearest(str(value), list(choices)),
        )


def check_switch(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {value!r}")
