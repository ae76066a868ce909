"""Ascend NPUs with HCCL, through torch_npu and MindSpeed.  NOT RUN ON HARDWARE YET.

Everything here was written from the documentation of torch_npu and MindSpeed and is tested without
a device: the decisions are, the calls into torch_npu are not.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType

import torch

from megatrain.errors import PlatformError
from megatrain.platforms.platform import Patch

logger = logging.getLogger(__name__)

TORCH_NPU = "torch_npu"
MINDSPEED = "mindspeed"

CONNECT_TIMEOUT_S = 1200
"""HCCL gives up connecting after 120 s, less than a slow file system needs to load a rank."""


class NpuPlatform:
    """One NPU a rank, collectives over HCCL.  Not run on hardware yet."""

    name = "npu"
    collective_backend = "hccl"

    def is_available(self) -> bool:
        """Tell whether torch_npu is installed and sees a device."""
        if not is_installed(TORCH_NPU):
            return False
        importlib.import_module(TORCH_NPU)
        return bool(_torch_npu().is_available())

    def device(self, local_rank: int) -> torch.device:
        """Select and return the NPU with this number on its host.

        Raises PlatformError when torch_npu is missing or there are fewer NPUs.
        """
        check_installed(is_installed)
        importlib.import_module(TORCH_NPU)
        check_device(local_rank, int(_torch_npu().device_count()))
        device = torch.device("npu", local_rank)
        _torch_npu().set_device(device)
        return device

    def environment(self) -> dict[str, str]:
        """Return the variables that HCCL needs and the user has not set."""
        wanted = {"HCCL_CONNECT_TIMEOUT": str(CONNECT_TIMEOUT_S)}
        return {name: value for name, value in wanted.items() if name not in os.environ}

    def patches(self) -> tuple[Patch, ...]:
        """Return what redirects Megatron's CUDA lines to the NPU.

        Raises PlatformError when torch_npu is missing.
        """
        check_installed(is_installed)
        return redirections(has_mindspeed=is_installed(MINDSPEED))


def is_installed(module: str) -> bool:
    """Tell whether a top-level module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def check_installed(installed: Callable[[str], bool]) -> None:
    """Raise PlatformError unless torch_npu is there; warn when MindSpeed is not."""
    if not installed(TORCH_NPU):
        raise PlatformError(
            "the npu platform needs torch_npu, which is not installed",
            hint="use an Ascend image with CANN, or install the torch_npu that fits this torch",
        )
    if not installed(MINDSPEED):
        logger.warning(
            "MindSpeed is not installed: Megatron runs on torch_npu's own redirection of CUDA "
            "calls, without Ascend's fused kernels"
        )


def check_device(local_rank: int, num_devices: int) -> None:
    """Raise PlatformError unless a rank with this number can have an NPU of its own."""
    if not 0 <= local_rank < num_devices:
        raise PlatformError(
            "every rank needs an NPU of its own: "
            f"local rank {local_rank}, {num_devices} NPU(s) on this host",
            hint="start fewer ranks on this host, or check `npu-smi info`",
        )


def redirections(*, has_mindspeed: bool) -> tuple[Patch, ...]:
    """Choose who redirects CUDA calls: MindSpeed, which knows Megatron, or torch_npu, which not."""
    if has_mindspeed:
        return (
            Patch(
                "npu.mindspeed",
                "importing MindSpeed's adaptor before Megatron replaces its CUDA-only parts",
                functools.partial(_import_once, "mindspeed.megatron_adaptor"),
            ),
        )
    return (
        Patch(
            "npu.transfer",
            "megatron-core says torch.cuda and device='cuda'; torch_npu turns them into its own",
            functools.partial(_import_once, "torch_npu.contrib.transfer_to_npu"),
        ),
    )


def _import_once(module: str) -> None:
    """Import a module for its effect.  Python keeps it: a second call does nothing."""
    importlib.import_module(module)


def _torch_npu() -> ModuleType:
    """Return `torch.npu`, which exists once torch_npu has been imported."""
    npu: ModuleType = getattr(torch, "npu")  # noqa: B009  # not an attribute torch declares
    return npu
