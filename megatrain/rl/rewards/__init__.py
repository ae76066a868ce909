"""Rewards that need no model: format, accuracy, GSM8K, Countdown."""

from megatrain.rl.rewards.accuracy import (
    AccuracyReward,
    GSM8KAccuracyReward,
    GSM8KFormatReward,
)
from megatrain.rl.rewards.countdown import CountdownReward
from megatrain.rl.rewards.format import FormatReward

__all__ = [
    "AccuracyReward",
    "CountdownReward",
    "FormatReward",
    "GSM8KAccuracyReward",
    "GSM8KFormatReward",
]
