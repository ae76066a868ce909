"""Which adapter a call means that names none, or one that is not there.  No torch."""

from megatrain.errors import StateError


def resolve(adapter: str | None, known: list[str]) -> str:
    """Return the name that is meant among those that are trained.  Raises StateError."""
    if adapter is None and known:
        return known[0]
    if adapter is None or adapter not in known:
        names = ", ".join(repr(name) for name in known) or "none"
        raise StateError(
            f"there is no adapter called {adapter!r}; known: {names}",
            hint="call add_adapter_to_model first, or set_optimizer to train all parameters",
        )
    return adapter


def resolve_pass(adapter: str | None, known: list[str], *, train: bool) -> str:
    """Return the name that a pass means; one without gradients may mean the base, "".

    Raises StateError.
    """
    if not train and (adapter == "" or (adapter is None and not known)):
        return ""
    return resolve(adapter, known)
