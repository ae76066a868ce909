"""Recipes of the cookbook run unmodified: losses fall, reward rises, what was saved goes on."""

import statistics

import pytest

from tests.service.recipes import Recipes, recipe_server

pytestmark = [pytest.mark.multiprocess, pytest.mark.chaos, pytest.mark.timeout(600)]

MATHS = ("loss_fn=importance_sampling", "max_tokens=8")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    server = recipe_server(folder / "service")
    server.start()
    recipes = Recipes(server, folder / "work")
    recipes.folder.mkdir()
    recipes.prepare()
    yield recipes
    assert server.stop() == 0


def values(metrics: list[dict[str, float]], name: str) -> list[float]:
    found = [each[name] for each in metrics if name in each]
    assert found, [sorted(each) for each in metrics]
    return found


def test_sl_loop_learns_and_resumes_from_its_checkpoint(recipes):
    options = ("batch_size=8", "save_every=4", "learning_rate=3e-3", "lora_rank=8")
    first = recipes.run("sl_loop", "sl", *options, "max_steps=8")
    losses = values(first, "train_mean_nll")
    assert losses[-1] < 0.8 * losses[0]
    saved = (recipes.folder / "sl" / "checkpoints.jsonl").read_text().splitlines()
    # Without its last line the folder is that of a run that was ended after the fourth step.
    (recipes.folder / "sl" / "checkpoints.jsonl").write_text(saved[0] + "\n")
    (recipes.folder / "sl" / "metrics.jsonl").unlink()
    resumed = recipes.run("sl_loop", "sl", *options, "max_steps=8")
    assert "Resuming" in recipes.output("sl")
    assert values(resumed, "train_mean_nll") == pytest.approx(losses[4:], rel=1e-5)


def test_rl_loop_raises_the_reward(recipes):
    options = ("batch_size=8", "group_size=8", "lora_rank=8", "learning_rate=4e-3", "save_every=0")
    metrics = recipes.run("rl_loop", "rl", *MATHS, *options, "max_steps=16")
    rewards = values(metrics, "reward/total")
    first, last = statistics.mean(rewards[:4]), statistics.mean(rewards[-4:])
    # 256 samples each: three standard deviations of the difference of their means are below 0.14.
    assert 0.25 < first < 0.75
    assert last > first + 0.15, rewards


@pytest.mark.parametrize("version", ["0.5.8"])
def test_the_older_cookbook_trains_and_samples_too(recipes, version):
    losses = recipes.run(
        "sl_loop", "sl-old", "batch_size=8", "max_steps=4", "save_every=2", version=version
    )
    assert len(values(losses, "train_mean_nll")) == 4
    options = ("batch_size=2", "group_size=4", "max_tokens=8", "max_steps=2", "save_every=1")
    rewards = recipes.run("rl_loop", "rl-old", *options, version=version)
    assert len(values(rewards, "reward/total")) == 2


def test_a_loss_without_a_public_formula_names_the_one_to_take(recipes):
    options = ("batch_size=4", "group_size=8", "max_tokens=8", "max_steps=2")
    recipes.run("rl_loop", "stable", *options, fails=True)
    assert "loss_fn=importance_sampling" in recipes.output("stable")
