"""NVIDIA GPUs with NCCL.  Megatron is written for them: nothing is patched here, ever."""

import logging
import os

import torch
import torch.distributed

from megatrain.errors import PlatformError
from megatrain.platforms import nvidia
from megatrain.platforms.platform import Patch

logger = logging.getLogger(__name__)


class CudaPlatform:
    """One GPU a rank, collectives over NCCL."""

    name = "cuda"
    collective_backend = "nccl"

    def is_available(self) -> bool:
        """Tell whether torch was built for CUDA and sees a device."""
        return torch.version.cuda is not None and torch.cuda.is_available()

    def device(self, local_rank: int) -> torch.device:
        """Select and return the GPU with this number on its host.

        Call it after `environment`: CUDA reads its variables when the first context is made.
        Raises PlatformError when there are fewer GPUs, or torch has no NCCL.
        """
        num_devices = torch.cuda.device_count() if self.is_available() else 0
        check_device(local_rank, num_devices, has_nccl=torch.distributed.is_nccl_available())
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device

    def environment(self) -> dict[str, str]:
        """Return the variables that this host's GPUs need and the user has not set; log each."""
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
        wanted = nvidia.variables(_gpus(), nccl_version(), num_ranks=num_ranks)
        chosen = [variable for variable in wanted if variable.name not in os.environ]
        for variable in chosen:
            logger.info("%s=%s: %s", variable.name, variable.value, variable.reason)
        return {variable.name: variable.value for variable in chosen}

    def patches(self) -> tuple[Patch, ...]:
        """Return nothing: on a GPU, Megatron runs as its authors wrote it."""
        return ()


def check_device(local_rank: int, num_devices: int, *, has_nccl: bool) -> None:
    """Raise PlatformError unless a rank with this number can have a GPU of its own."""
    if num_devices == 0:
        raise PlatformError(
            "the cuda platform needs an NVIDIA GPU that torch can see: found 0",
            hint="run `megatrain doctor`, or choose the cpu platform",
        )
    if not 0 <= local_rank < num_devices:
        raise PlatformError(
            "every rank needs a GPU of its own: "
            f"local rank {local_rank}, {num_devices} GPU(s) on this host",
            hint=f"start at most {num_devices} rank(s) on this host",
        )
    if not has_nccl:
        raise PlatformError(
            "the cuda platform needs a torch that was built with NCCL",
            hint="install the CUDA build of torch; `megatrain doctor` prints the command",
        )


def nccl_version() -> nvidia.Version:
    """Return the version of the NCCL that torch uses; () when torch has none."""
    if not torch.distributed.is_nccl_available():
        return ()
    return tuple(torch.cuda.nccl.version()[:3])  # type: ignore[no-untyped-call]


def _gpus() -> tuple[nvidia.Gpu, ...]:
    """Ask the driver; where nvidia-smi is absent, torch, at the price of initialising CUDA."""
    gpus = nvidia.query_gpus()
    if gpus or not torch.cuda.is_available():
        return gpus
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = (facts.major, facts.minor)
        found.append(nvidia.Gpu(index, facts.name, capability, facts.total_memory >> 20))
    return tuple(found)
