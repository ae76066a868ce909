"""What is refused before a row is read."""

import pytest

from megatrain.cli.train.check import check_metric
from megatrain.cli.train.model import REFERENCE, reference_name
from megatrain.cli.train.recipes import loss_of
from megatrain.errors import ConfigError
from tests.fixtures.run_config import configure


@pytest.mark.parametrize(
    ("recipe", "metric", "near"),
    [
        ("rm", "acuracy", "accuracy"),
        ("sft", "token_acuracy", "token_accuracy"),
        ("dpo", "rewards/accuracy", "rewards/accuracies"),
        ("rm", "token_accuracy", None),  # a score is no token
    ],
)
def test_a_best_metric_that_no_evaluation_has_is_refused_with_the_nearest(recipe, metric, near):
    config = configure(f"train.best_metric={metric}", recipe=recipe)
    with pytest.raises(ConfigError, match=f"'{metric}'; .* has .*loss") as caught:
        check_metric(config, loss_of(config))
    assert near is None or caught.value.hint == f"did you mean '{near}'?"


@pytest.mark.parametrize(
    ("recipe", "metric"),
    [("sft", "loss"), ("sft", "token_accuracy"), ("rm", "accuracy"), ("dpo", "rewards/margins")],
)
def test_what_an_evaluation_reports_may_decide_what_is_best(recipe, metric):
    config = configure(f"train.best_metric={metric}", recipe=recipe)
    check_metric(config, loss_of(config))


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("dpo", [], ""),
        ("dpo", ["train.adapter=sft"], REFERENCE),
        ("kto", ["train.adapter=sft"], REFERENCE),
        ("sft", ["train.adapter=sft"], ""),
        ("dpo", ["train.adapter=sft", "loss.reference_free=true"], ""),
    ],
)
def test_the_reference_is_the_adapter_that_training_starts_from(recipe, overrides, expected):
    config = configure(*overrides, recipe=recipe)
    assert reference_name(config, loss_of(config)) == expected
