"""Who asks."""

from dataclasses import dataclass

SCOPES = ("read", "train", "sample", "metrics", "admin")
"""What a key may be for; `metrics` reads /metrics from other hosts, `admin` is all of it, and a
look at its project's audit log."""


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller: a key of a project."""

    project: str
    key_id: int
    scopes: frozenset[str]
    name: str = ""

    def may(self, scope: str) -> bool:
        """Tell whether the key is for this; looking is what every key may."""
        return scope == "read" or scope in self.scopes or "admin" in self.scopes
