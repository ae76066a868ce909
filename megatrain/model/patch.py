"""Base class of patches: a named change to a model or a library, made where it applies.

What a device needs changed in Megatron before it is used is a platform's matter
(platforms/platform.py); these are a user's changes to a model that is built.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from megatrain.errors import ConfigError

logger = logging.getLogger(__name__)


class Patch(ABC):
    """One change, with the reason for it.  Options are keyword arguments of the constructor."""

    name: ClassVar[str]
    """Short and unique: what is changed."""
    reason: ClassVar[str]
    """Why, and when it can be deleted."""

    def applies(self, model: Any) -> bool:
        """Tell whether `model`, this rank's list of Megatron modules, needs the change."""
        return True

    @abstractmethod
    def apply(self, model: Any) -> None:
        """Make the change, in place.  Called once a model, and only where `applies`."""


def apply_to_model(patches: Iterable[Patch], model: Any) -> list[str]:
    """Apply those patches that apply to the model as the ones before left it; return their names.

    ConfigError, before anything has changed, if one has no name or two have the same.
    """
    patches = list(patches)
    names = [getattr(patch, "name", "") for patch in patches]
    for patch, name in zip(patches, names, strict=True):
        if not name or not getattr(patch, "reason", ""):
            raise ConfigError(f"{type(patch).__name__} needs a name and a reason")
        if names.count(name) > 1:
            raise ConfigError(f"two patches have the name {name!r}")
    applied = []
    for patch in patches:
        if patch.applies(model):
            patch.apply(model)
            applied.append(patch.name)
            logger.info("patch %s: %s", patch.name, patch.reason)
    return applied
