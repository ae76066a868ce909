"""Losses: each a function of tensors, and a Loss that gives it options; both are imported here.

N labels of one micro-batch, S sequences, P pairs (data 2i chosen, 2i + 1 rejected), K tokens of a
teacher.  Every Loss returns a sum; its divisor says what the sum over the global batch is divided
by.
"""

from megatrain.train.losses.distillation import DistillationLoss, distillation
from megatrain.train.losses.dpo import DPOLoss, dpo
from megatrain.train.losses.function import FunctionLoss
from megatrain.train.losses.grpo import GRPOLoss, grpo
from megatrain.train.losses.gspo import GSPOLoss, gspo
from megatrain.train.losses.kto import KTOLoss, kto
from megatrain.train.losses.likelihood import CrossEntropyLoss, cross_entropy
from megatrain.train.losses.make import make_loss
from megatrain.train.losses.mpo import MPOLoss, mpo
from megatrain.train.losses.orpo import ORPOLoss, orpo
from megatrain.train.losses.policy import (
    CISPOLoss,
    DROLoss,
    ImportanceSamplingLoss,
    PPOLoss,
    cispo,
    dro,
    importance_sampling,
    ppo,
)
from megatrain.train.losses.reward_model import RewardModelLoss, bradley_terry
from megatrain.train.losses.simpo import SimPOLoss, simpo

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
    "bradley_terry",
    "cispo",
    "cross_entropy",
    "distillation",
    "dpo",
    "dro",
    "grpo",
    "gspo",
    "importance_sampling",
    "kto",
    "make_loss",
    "mpo",
    "orpo",
    "ppo",
    "simpo",
]
