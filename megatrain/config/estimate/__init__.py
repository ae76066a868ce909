"""What a model needs on a layout: parameters, memory, arithmetic and time.  No torch.

`estimate(config, mesh, Training(...))` answers, `render` says it in lines.
"""

from megatrain.config.estimate.model import ModelShape
from megatrain.config.estimate.report import human, render
from megatrain.config.estimate.result import Estimate, Parameters, estimate
from megatrain.config.estimate.speed import DEVICES
from megatrain.config.estimate.training import Training
from megatrain.config.estimate.work import Work

__all__ = [
    "DEVICES",
    "Estimate",
    "ModelShape",
    "Parameters",
    "Training",
    "Work",
    "estimate",
    "human",
    "render",
]
