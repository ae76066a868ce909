"""Model FLOPs utilisation (MFU): the arithmetic that training needs over what devices could do.

The need is config/estimate/work.py's: 4 FLOPs a token and active parameter with a frozen base, 6
with all parameters trained, and attention.  What a device could do is its maker's figure where its
name is known, else the fastest matrix product measured here.
"""

import functools
import json
import logging

import torch

from megatrain.config.estimate.model import ModelShape
from megatrain.config.estimate.speed import DEVICES
from megatrain.config.estimate.work import Work
from megatrain.errors import ConfigError, UnknownFamilyError
from megatrain.model.network import Network
from megatrain.train.gemm import gemm_rate

logger = logging.getLogger(__name__)

GEMM_SIZE = {"cpu": 1024, "cuda": 8192, "npu": 8192}
"""Edge of the square matrices that are multiplied, by type of device."""

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Utilisation:
    """The MFU of one model's training calls."""

    def __init__(self, network: Network) -> None:
        self._groups, self._precision = network.groups, network.config.mixed_precision
        self._work = _work_of(network)

    def __call__(
        self, *, tokens: float, squares: float, seconds: float, is_frozen: bool
    ) -> float | None:
        """Return it for calls over sequences of so many tokens, and the sum of their squares.

        None for a family whose arithmetic is not known.  The first call on a device that is not
        known by name takes a moment to measure it.
        """
        if self._work is None or not seconds:
            return None
        flops = self._work.flops_of(tokens, squares, is_frozen=is_frozen)
        peak = peak_flops(self._groups.device, self._precision)
        return flops / (seconds * self._groups.mesh.world_size * peak)


def _work_of(network: Network) -> Work | None:
    config = json.loads((network.folder / "config.json").read_text())
    try:
        return Work.of_shape(ModelShape.from_config(config), with_head=not network.has_scores)
    except (ConfigError, UnknownFamilyError) as error:
        logger.debug("no mfu: %s", error.message)
        return None


@functools.cache
def peak_flops(device: torch.device, precision: str) -> float:
    """Return the FLOPs per second of one device, or of this process on a CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        for known, figures in DEVICES.items():
            if known in name:
                return figures.flops[precision]
    return gemm_rate(device, PRECISIONS[precision], size=GEMM_SIZE[device.type])
