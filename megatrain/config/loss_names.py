"""Names of the built-in losses.  No torch: a table of strings."""

from collections.abc import Mapping

_LOSSES = "megatrain.train.losses"

LOSSES: Mapping[str, str] = {
    "CrossEntropyLoss": f"{_LOSSES}.likelihood:CrossEntropyLoss",
    "ImportanceSamplingLoss": f"{_LOSSES}.policy:ImportanceSamplingLoss",
    "PPOLoss": f"{_LOSSES}.policy:PPOLoss",
    "CISPOLoss": f"{_LOSSES}.policy:CISPOLoss",
    "DROLoss": f"{_LOSSES}.policy:DROLoss",
    "GSPOLoss": f"{_LOSSES}.gspo:GSPOLoss",
    "GRPOLoss": f"{_LOSSES}.grpo:GRPOLoss",
    "DPOLoss": f"{_LOSSES}.dpo:DPOLoss",
    "SimPOLoss": f"{_LOSSES}.simpo:SimPOLoss",
    "ORPOLoss": f"{_LOSSES}.orpo:ORPOLoss",
    "KTOLoss": f"{_LOSSES}.kto:KTOLoss",
    "RewardModelLoss": f"{_LOSSES}.reward_model:RewardModelLoss",
    "MPOLoss": f"{_LOSSES}.mpo:MPOLoss",
    "DistillationLoss": f"{_LOSSES}.distillation:DistillationLoss",
    # Tinker's names for the same losses.
    "cross_entropy": f"{_LOSSES}.likelihood:CrossEntropyLoss",
    "importance_sampling": f"{_LOSSES}.policy:ImportanceSamplingLoss",
    "ppo": f"{_LOSSES}.policy:PPOLoss",
    "cispo": f"{_LOSSES}.policy:CISPOLoss",
    "dro": f"{_LOSSES}.policy:DROLoss",
    "gspo": f"{_LOSSES}.gspo:GSPOLoss",
}
"""Name -> "module:Class"."""
