"""Layout, loss and steps that follow from a configuration."""

import pytest

from megatrain.cli.train.job import count_steps
from megatrain.cli.train.mesh import mesh_of
from megatrain.cli.train.model import complete_schedule
from megatrain.cli.train.recipes import RECIPES, loss_of
from megatrain.errors import ConfigError, LayoutError
from megatrain.parallel.layout import DeviceMesh
from tests.fixtures.run_config import configure


def test_data_parallelism_takes_the_ranks_that_are_left():
    config = configure("mesh.tp=2", "mesh.cp=2")
    assert config.num_ranks == 4
    assert mesh_of(config, 8) == DeviceMesh(dp=2, tp=2, cp=2)
    with pytest.raises(LayoutError, match="ranks=6"):
        mesh_of(config, 6)
    with pytest.raises(LayoutError):
        mesh_of(configure("mesh.dp=2"), 4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_loss_that_goes_with_it(recipe):
    assert loss_of(configure(recipe=recipe)).unit == RECIPES[recipe].unit


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("sft", ["loss.name=RewardModelLoss"], "needs scores"),
        ("rm", ["loss.name=DPOLoss"], "does not take scores"),
        ("sft", ["loss.name=DPOLoss"], "takes 2 data a row"),
        ("dpo", ["loss.bta=0.2"], "'bta'"),
        ("dpo", ["loss.name=DPOLos"], "unknown loss 'DPOLos'"),
        ("kto", ["train.batch_size=1"], "at least 2"),
        ("dpo", ["full=true", "data.streaming=true", "train.max_steps=2"], "streaming"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused_before_weights_are_read(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        loss_of(configure(*overrides, recipe=recipe))


def test_all_rows_are_trained_on_in_every_epoch_although_the_last_step_needs_more():
    config = configure("train.epochs=3", "train.gradient_accumulation_steps=2")
    assert count_steps(config, range(5)) == 8
    assert count_steps(configure("train.max_steps=7"), range(5)) == 7


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["schedule.warmup_ratio=0.1"], {"num_warmup_steps": 5, "num_training_steps": 50}),
        (["schedule=none"], {}),
        (["schedule=constant"], {}),
        (["schedule=constant_with_warmup"], {"num_warmup_steps": 0}),
        (
            ["schedule=default", "schedule.max_lr=1e-3"],
            {"lr_warmup_steps": 0, "lr_decay_steps": 50, "max_lr": 1e-3},
        ),
        (
            ["schedule.num_warmup_steps=3", "schedule.num_cycles=0.25"],
            {"num_warmup_steps": 3, "num_training_steps": 50, "num_cycles": 0.25},
        ),
    ],
)
def test_a_schedule_is_as_long_as_the_run(overrides, expected):
    assert complete_schedule(configure(*overrides), steps=50) == expected


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule=none", "schedule.warmup_ratio=0.1"],
        ["schedule=constant", "schedule.warmup_ratio=0.1"],
        ["schedule=cosin"],
        ["schedule.num_cycle=1"],
    ],
)
def test_a_schedule_refuses_what_would_have_no_effect(overrides):
    with pytest.raises(ConfigError):
        complete_schedule(configure(*overrides), steps=50)
