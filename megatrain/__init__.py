"""Megatron-first distributed training of large language models.

Names are loaded when they are first used: `import megatrain` imports no torch.
"""

import importlib
from typing import TYPE_CHECKING

from megatrain.parallel.layout import DeviceMesh

if TYPE_CHECKING:
    from megatrain.api.megatron_model import MegatronModel
    from megatrain.api.session import initialize, shutdown
    from megatrain.types import InputFeature, StepOutput

__version__ = "0.1.0"

__all__ = [
    "DeviceMesh",
    "InputFeature",
    "MegatronModel",
    "StepOutput",
    "__version__",
    "initialize",
    "shutdown",
]

_HOMES = {
    "InputFeature": "megatrain.types",
    "MegatronModel": "megatrain.api.megatron_model",
    "StepOutput": "megatrain.types",
    "initialize": "megatrain.api.session",
    "shutdown": "megatrain.api.session",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'megatrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
