"""Where a loader stands, and whether a state is of the loader that it is given to."""

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

from megatrain.errors import ConfigError


class LoaderState(TypedDict):
    """Where a loader stands, as JSON takes it."""

    consumed_train_samples: int
    """Samples handed to the caller over all epochs, the batch in hand included."""
    epoch: int
    position: int
    """Samples of this epoch that have been handed out."""
    seed: int
    shuffle: bool
    num_samples: int | None
    """Samples of an epoch, before a tail is left out; None for a stream."""
    fingerprint: str | None
    """Digits of the encoded rows' content; None where rows are not stored."""


def check_state(state: Mapping[str, Any], now: LoaderState) -> None:
    """Raise ConfigError unless a state is of the order and the data of the loader that is here.

    `now` is the loader's own state.
    """
    unknown = state.keys() ^ LoaderState.__annotations__.keys()
    if unknown:
        raise ConfigError(
            f"not a state of a DataLoader: it has {sorted(state)}",
            hint=f"give get_state()'s value, with {sorted(LoaderState.__annotations__)}",
        )
    here: Mapping[str, Any] = now
    for name in ("seed", "shuffle"):
        if state[name] != here[name]:
            raise ConfigError(
                f"the order was made with {name}={state[name]}, and this loader has {here[name]}",
                hint=f"make the loader with {name}={state[name]}",
            )
    for name in ("num_samples", "fingerprint"):
        if state[name] != here[name]:
            raise ConfigError(
                f"the state is of other data: {name}={state[name]}, and this loader has "
                f"{here[name]}",
                hint="make the dataset as it was, with the same files, steps and template; or "
                "give consumed_train_samples alone to go on with other data",
            )
    places = ("epoch", "position", "consumed_train_samples")
    check_numbers(**{name: state[name] for name in places})
    if now["num_samples"] is not None and state["position"] > now["num_samples"]:
        raise ConfigError(
            f"position={state['position']} is behind the end of an epoch of {now['num_samples']}",
            hint="give get_state()'s value as it was",
        )


def check_numbers(**options: Any) -> None:
    """Raise ConfigError for an option that is no whole number, 0 or more."""
    for name, value in options.items():
        is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_number or value < 0:
            raise ConfigError(f"{name} must be a whole number, 0 or more: got {value!r}")
