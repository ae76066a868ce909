"""Losses: each a function of tensors in a module of its name, and a Loss that gives it options.

N labels of one micro-batch, S sequences, P pairs (data 2i chosen, 2i + 1 rejected), K tokens of a
teacher.  Every Loss returns a sum; its divisor says what the sum over the global batch is divided
by.
"""

from megatrain.train.losses.distillation import DistillationLoss
from megatrain.train.losses.dpo import DPOLoss
from megatrain.train.losses.function import FunctionLoss
from megatrain.train.losses.grpo import GRPOLoss
from megatrain.train.losses.gspo import GSPOLoss
from megatrain.train.losses.kto import KTOLoss
from megatrain.train.losses.likelihood import CrossEntropyLoss, cross_entropy
from megatrain.train.losses.make import make_loss
from megatrain.train.losses.mpo import MPOLoss
from megatrain.train.losses.orpo import ORPOLoss
from megatrain.train.losses.policy import CISPOLoss, DROLoss, ImportanceSamplingLoss, PPOLoss
from megatrain.train.losses.reward_model import RewardModelLoss
from megatrain.train.losses.simpo import SimPOLoss

__all__ = [
    "CISPOLoss",
    "CrossEntropyLoss",
    "DPOLoss",
    "DROLoss",
    "DistillationLoss",
    "FunctionLoss",
    "GRPOLoss",
    "GSPOLoss",
    "ImportanceSamplingLoss",
    "KTOLoss",
    "MPOLoss",
    "ORPOLoss",
    "PPOLoss",
    "RewardModelLoss",
    "SimPOLoss",
    "cross_entropy",
    "make_loss",
]
