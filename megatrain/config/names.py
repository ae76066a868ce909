"""Names and options that a user gave, against those that there are."""

from collections.abc import Iterable
from difflib import get_close_matches

from megatrain.errors import ConfigError


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return a hint with the name that `name` may have meant, or None."""
    by_lower = {each.lower(): each for each in known}
    matches = get_close_matches(str(name).lower(), by_lower, n=1)
    return f"did you mean {by_lower[matches[0]]!r}?" if matches else None


def check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for the first given name that is not known; it tells the nearest."""
    names = sorted(known)
    for name in given:
        if name not in names:
            raise ConfigError(
                f"unknown {what} {name!r}; known: {', '.join(names)}", hint=nearest(name, names)
            )
