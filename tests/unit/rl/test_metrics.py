"""Metrics over several calls."""

import statistics
import subprocess
import sys

import numpy as np
import pytest

from megatrain.config.estimate.work import Work
from megatrain.errors import ConfigError
from megatrain.rl.metrics import (
    CompletionRewardMetric,
    GradNormMetric,
    LossMetric,
    ThroughputMetric,
    TokenAccuracyMetric,
)
from megatrain.types import StepOutput


def output(loss, num_tokens, divisor=None, **statistics):
    """Return a step's output without log-probabilities; by default a mean over labels."""
    divisor = float(num_tokens if divisor is None else divisor)
    return StepOutput(
        loss=loss, logps=[], num_tokens=num_tokens, divisor=divisor, statistics=statistics
    )


def test_completion_rewards_are_means_and_deviations_until_reset():
    metric = CompletionRewardMetric()
    assert metric.calculate() == {}
    metric.accumulate(
        None, None, completion_lengths=[3, 5], rewards={"total": [1.0, 2.0], "format": [1.0, 0.0]}
    )
    metric.accumulate(completion_lengths=[10], rewards={"total": [0.0]}, generate_time=2.0)
    found = metric.calculate()
    assert found["train/total_reward"] == pytest.approx(1.0)
    assert found["train/total_reward_std"] == pytest.approx(statistics.stdev([1.0, 2.0, 0.0]))
    assert found["train/format_reward"] == pytest.approx(0.5)
    assert found["train/completion_length"] == pytest.approx(6.0)
    assert found["train/completion_length_max"] == 10
    assert found["profiling/generate_seconds"] == 2.0
    metric.reset()
    assert metric.calculate() == {}


def test_completions_without_a_score_are_left_out():
    metric = CompletionRewardMetric()
    metric.accumulate(rewards={"a": [None, 2.0, float("nan")], "b": [None]})
    assert metric.calculate() == {"train/a_reward": 2.0, "train/a_reward_std": 0.0}


def test_loss_and_accuracy_are_weighted_by_label_tokens():
    loss, accuracy = LossMetric(), TokenAccuracyMetric()
    calls = [
        output(2.0, 1, token_accuracy=1.0),
        output(1.0, 3, token_accuracy=1 / 3),
        output(5.0, 0),
    ]
    for each in calls:
        loss.accumulate(None, each)
        accuracy.accumulate(None, each)
    assert loss.calculate() == {"loss": pytest.approx(1.25), "label_tokens": 4.0}
    assert accuracy.calculate() == {"token_accuracy": pytest.approx(0.5)}
    loss.reset()
    accuracy.reset()
    assert loss.calculate() == accuracy.calculate() == {}


def test_a_loss_of_pairs_is_weighted_by_pairs_not_by_their_labels():
    loss = LossMetric()
    for each in (output(0.2, 900, divisor=1), output(0.8, 100, divisor=3)):
        loss.accumulate(None, each)
    assert loss.calculate() == {"loss": pytest.approx(0.65), "label_tokens": 1000.0}


def test_gradient_norms_between_steps_do_not_count():
    metric = GradNormMetric()
    for norm in (1.0, None, 3.0):
        metric.accumulate(grad_norm=norm)
    assert metric.calculate() == {"grad_norm": 2.0, "grad_norm_max": 3.0}


def test_mfu_is_the_models_arithmetic_over_the_devices():
    work = Work(total_parameters=300, active_parameters=280, attention_width=8)
    rows = [{"input_ids": [1, 2, 3]}, {"length": 4}, {"input_ids": [0] * 5, "lengths": [2, 3]}]
    for is_frozen, per_parameter in ((True, 4), (False, 6)):
        metric = ThroughputMetric(num_devices=2, work=work, peak_flops=1e4, is_frozen=is_frozen)
        metric.accumulate(rows, seconds=0.5)
        metric.accumulate(rows, seconds=1.5)
        flops = 2 * (per_parameter * 280 * 12 + 6 * 8 * (9 + 16 + 4 + 9))
        found = metric.calculate()
        assert found["mfu"] == pytest.approx(flops / (2.0 * 2 * 1e4))
        assert found["tokens_per_second"] == pytest.approx(12.0)
        assert found["tokens_per_second_per_device"] == pytest.approx(6.0)
    assert "mfu" not in ThroughputMetric().calculate()
    with pytest.raises(ConfigError, match="both"):
        ThroughputMetric(work=work)


def test_results_are_plain_numbers():
    metric = CompletionRewardMetric()
    metric.accumulate(rewards={"a": np.array([1.0, 2.0])}, completion_lengths=np.array([1, 2]))
    assert {type(value) for value in metric.calculate().values()} == {float}


def test_the_package_needs_no_torch():
    code = (
        "import sys, megatrain.rl.advantages, megatrain.rl.rewards, megatrain.rl.metrics;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
