"""Layout, loss and steps that follow from a configuration."""

import pytest

from megatrain.cli.train.job import count_steps
from megatrain.cli.train.mesh import mesh_of
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
        ("kto", ["full=true"], "reference point"),
        ("kto", ["train.batch_size=1"], "at least 2"),
        ("dpo", ["full=true", "data.streaming=true", "train.max_steps=2"], "streaming"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused_before_weights_are_read(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        loss_of(configure(*overrides, recipe=recipe))


def test_the_last_step_of_a_run_may_have_fewer_batches():
    config = configure("train.epochs=3", "train.gradient_accumulation_steps=2")
    assert count_steps(config, range(5)) == 8
    assert count_steps(configure("train.max_steps=7"), range(5)) == 7
