"""What the rest of the code may know of a device: its name, its collectives, and its patches."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patch:
    """One change to somebody else's module, with the reason for it."""

    name: str
    """Short and unique: what is changed."""
    reason: str
    """Why, with a link where upstream knows of it; and when it can be deleted."""
    apply: Callable[[], None] = field(repr=False)
    """Make the change.  Safe to call again: modules that were imported since are then covered."""


class Platform(Protocol):
    """A kind of device.  Implementations: cpu, cuda, npu."""

    name: str
    """As a user names it: cpu, cuda or npu."""
    collective_backend: str
    """torch.distributed's name: gloo, nccl or hccl."""

    def is_available(self) -> bool:
        """Tell whether this machine has such a device."""
        ...

    def device(self, local_rank: int) -> torch.device:
        """Select and return the device of the process with this rank on its host."""
        ...

    def environment(self) -> dict[str, str]:
        """Return variables to set before the first collective, each only if the user has not."""
        ...

    def patches(self) -> tuple[Patch, ...]:
        """Return the changes to make before Megatron is used, in order."""
        ...


_applied: set[str] = set()


def apply_patches(patches: tuple[Patch, ...]) -> None:
    """Apply each patch; the first time, say so in the log."""
    for patch in patches:
        patch.apply()
        if patch.name not in _applied:
            _applied.add(patch.name)
            logger.debug("patch %s: %s", patch.name, patch.reason)
