"""Advantages: GRPO, RLOO, REINFORCE++ and GAE."""

from megatrain.rl.advantages.gae import GAEAdvantage, gae
from megatrain.rl.advantages.group import GRPOAdvantage, RLOOAdvantage
from megatrain.rl.advantages.reinforce import ReinforcePlusPlusAdvantage

__all__ = [
    "GAEAdvantage",
    "GRPOAdvantage",
    "RLOOAdvantage",
    "ReinforcePlusPlusAdvantage",
    "gae",
]
