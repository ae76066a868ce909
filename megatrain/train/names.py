"""Names and options that a user gave, against those that there are."""

from collections.abc import Iterable
from difflib import get_close_matches

from megatrain.errors import ConfigError


def check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for the first given name that is not known; it tells the nearest."""
    names = sorted(known)
    for name in given:
        if name in names:
            continue
        by_lower = {each.lower(): each for each in names}
        near = get_close_matches(str(name).lower(), by_lower, n=1)
        raise ConfigError(
            f"unknown {what} {name!r}; known: {', '.join(names)}",
            hint=f"did you mean {by_lower[near[0]]!r}?" if near else None,
        )
