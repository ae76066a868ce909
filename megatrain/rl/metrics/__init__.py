"""Metrics of steps (loss, accuracy, gradient norm, speed) and of sampled completions."""

from megatrain.rl.metrics.completion import CompletionRewardMetric
from megatrain.rl.metrics.speed import ThroughputMetric
from megatrain.rl.metrics.training import GradNormMetric, LossMetric, TokenAccuracyMetric

__all__ = [
    "CompletionRewardMetric",
    "GradNormMetric",
    "LossMetric",
    "ThroughputMetric",
    "TokenAccuracyMetric",
]
