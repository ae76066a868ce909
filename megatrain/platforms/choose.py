"""Which platform a process runs on, and Megatron made ready for it."""

import os
import warnings
from typing import Any

from megatrain.errors import ConfigError, PlatformError
from megatrain.platforms.bridge_import import import_megatron
from megatrain.platforms.cpu import CpuPlatform
from megatrain.platforms.cuda import CudaPlatform
from megatrain.platforms.npu import NpuPlatform
from megatrain.platforms.platform import Platform, apply_patches

PLATFORMS: dict[str, Any] = {"cuda": CudaPlatform, "npu": NpuPlatform, "cpu": CpuPlatform}
"""By name, the fastest first."""


def choose_platform(name: str = "auto") -> Platform:
    """Return the platform of this name, or for `auto` the fastest that is there.

    Raises ConfigError for an unknown name, PlatformError if the machine has no such device.
    """
    if name == "auto":
        name = next(name for name, kind in PLATFORMS.items() if kind().is_available())
    if name not in PLATFORMS:
        raise ConfigError(f"unknown platform {name!r}; known: auto, {', '.join(PLATFORMS)}")
    platform: Platform = PLATFORMS[name]()
    if not platform.is_available():
        raise PlatformError(
            f"this machine has no {name} device", hint="megatrain doctor says what is missing"
        )
    return platform


def prepare(platform: Platform) -> None:
    """Set the platform's variables, import Megatron and apply the platform's patches.

    Call it again after other Megatron modules were imported: patches then cover those too.
    """
    for key, value in platform.environment().items():
        os.environ.setdefault(key, value)
    import_megatron()
    # Megatron calls collectives by the names they had before torch 2.13.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    apply_patches(platform.patches())
