"""Megatron-first distributed training of large language models.

Names are loaded when they are first used: `import megatrain` imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from megatrain.config.plugins import BUILT_IN
from megatrain.parallel.layout import DeviceMesh as DeviceMesh

if TYPE_CHECKING:
    from megatrain.api.build import build as build
    from megatrain.api.megatron_model import MegatronModel as MegatronModel
    from megatrain.api.placement import get_device_placement as get_device_placement
    from megatrain.api.session import initialize as initialize
    from megatrain.api.session import shutdown as shutdown
    from megatrain.bus.driver import Driver as Driver
    from megatrain.config.bus import RecoveryPolicy as RecoveryPolicy
    from megatrain.config.device_group import DeviceGroup as DeviceGroup
    from megatrain.data.dataset import Dataset as Dataset
    from megatrain.data.loader import DataLoader as DataLoader
    from megatrain.data.meta import DatasetMeta as DatasetMeta
    from megatrain.data.packed_dataset import PackingDataset as PackingDataset
    from megatrain.log import get_logger as get_logger
    from megatrain.train.loss import Loss as Loss
    from megatrain.train.loss import LossBatch as LossBatch
    from megatrain.train.loss import LossInput as LossInput
    from megatrain.types import InputFeature as InputFeature
    from megatrain.types import StepOutput as StepOutput
    from megatrain.types import Trajectory as Trajectory

__version__ = "0.1.0"

_HOMES = {
    "Advantage": "megatrain.rl.advantage",
    "DataLoader": "megatrain.data.loader",
    "Dataset": "megatrain.data.dataset",
    "DatasetMeta": "megatrain.data.meta",
    "DeviceGroup": "megatrain.config.device_group",
    "DatasetStatistics": "megatrain.data.statistics",
    "Driver": "megatrain.bus.driver",
    "Filter": "megatrain.data.filters",
    "InputFeature": "megatrain.types",
    "FunctionLoss": "megatrain.train.losses.function",
    "Loss": "megatrain.train.loss",
    "LossBatch": "megatrain.train.loss",
    "LossInput": "megatrain.train.loss",
    "MegatronModel": "megatrain.api.megatron_model",
    "Metric": "megatrain.rl.metric",
    "PackingDataset": "megatrain.data.packed_dataset",
    "Patch": "megatrain.model.patch",
    "Preprocessor": "megatrain.data.preprocessors.base",
    "RecoveryPolicy": "megatrain.config.bus",
    "Reward": "megatrain.rl.reward",
    "StepOutput": "megatrain.types",
    "Trajectory": "megatrain.types",
    "build": "megatrain.api.build",
    "get_device_placement": "megatrain.api.placement",
    "get_logger": "megatrain.log",
    "latest_state": "megatrain.export.state.retention",
    "initialize": "megatrain.api.session",
    "register": "megatrain.config.plugins",
    "shutdown": "megatrain.api.session",
}
_HOMES |= dict.fromkeys(
    (
        "BusError",
        "CancelledCommandError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "DeadlineError",
        "ExportError",
        "LayoutError",
        "MegatrainError",
        "NonFiniteError",
        "PlatformError",
        "RankError",
        "StateError",
        "UnknownFamilyError",
    ),
    "megatrain.errors",
)
# Whatever can be named (GRPOLoss, GSM8KProcessor, ...) can be imported; other systems' names for
# the same thing, which begin with a small letter, are names only.
_HOMES |= {
    name: home.partition(":")[0]
    for table in BUILT_IN.values()
    for name, home in table.items()
    if name[0].isupper()
}

__all__ = sorted(["DeviceMesh", "__version__", *_HOMES])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megatrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
