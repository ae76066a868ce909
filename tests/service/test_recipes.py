"""Recipes of the cookbook run unmodified: losses fall, reward rises, what was saved goes on.

A policy's samples differ from run to run, so bounds on rewards are in standard deviations.
"""

import math
import statistics
from itertools import pairwise

import pytest

from tests.service import offline
from tests.service.cookbook import VERSIONS
from tests.service.recipes import live_recipes

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]

MATHS = ("loss_fn=importance_sampling", "max_tokens=8", "lora_rank=8", "learning_rate=4e-3")
SMALL = ("lora_rank=8", "learning_rate=3e-3")
AGREES = 1e-4
"""Of log-probabilities in float32, of the sampler and of the trainer; 1e-5 is usual."""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    with live_recipes(tmp_path_factory.mktemp("recipes")) as recipes:
        yield recipes


@pytest.fixture(scope="module")
def reinforced(recipes):
    """The metrics of rl_loop, whose last checkpoint answers better than the base."""
    options = ("batch_size=8", "group_size=8", "save_every=0", "max_steps=16")
    return recipes.run("rl_loop", "rl", *MATHS, *options)


def values(metrics: list[dict[str, float]], name: str) -> list[float]:
    found = [each[name] for each in metrics if name in each]
    assert found, [sorted(each) for each in metrics]
    return found


def margin(samples: int, deviations: float = 4.0) -> float:
    """Return what two shares of so many samples each differ by at most, by chance.

    A sample's variance is 1/4 at most; those of one question share a part of it, which this
    leaves out: hence four deviations.
    """
    return deviations * math.sqrt(2 * 0.25 / samples)


@pytest.mark.slow
def test_sl_loop_learns_and_resumes_from_its_checkpoint(recipes):
    options = ("batch_size=8", "save_every=4", "max_steps=8", *SMALL)
    losses = values(recipes.run("sl_loop", "sl", *options), "train_mean_nll")
    assert losses[-1] < 0.85 * losses[0]
    recipes.cut("sl", checkpoints=1)
    resumed = recipes.run("sl_loop", "sl", *options)
    assert "Resuming" in recipes.output("sl")
    assert values(resumed, "train_mean_nll") == pytest.approx(losses[4:], rel=1e-5)


@pytest.mark.slow
def test_rl_loop_raises_the_reward(reinforced):
    rewards = values(reinforced, "reward/total")
    first, last = statistics.mean(rewards[:4]), statistics.mean(rewards[-4:])
    assert 0.2 < first < 0.7, rewards  # the base is right in about half of all cases
    assert last > first + margin(samples=4 * 64), rewards


@pytest.mark.chaos
def test_chat_sl_learns_and_its_sampler_finds_the_same_loss(recipes):
    options = ("batch_size=32", "max_steps=8", "eval_every=4", "save_every=4", *SMALL)
    metrics = recipes.run("chat_sl.train", "chat", "dataset=no_robots", *options)
    losses, tested = values(metrics, "train_mean_nll"), values(metrics, "test/nll")
    assert losses[-1] < 0.85 * losses[0]
    assert tested[-1] < 0.95 * tested[0]
    # Of the same weights, by the trainer and by the sampler, on two draws of the same questions.
    assert tested[0] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.chaos
@pytest.mark.parametrize("version", VERSIONS)
def test_sl_basic_learns_and_tests_on_what_it_has_not_seen(recipes, version):
    options = ("learning_rate=3e-3", "max_steps=4", "eval_every=2")
    metrics = recipes.run("sl_basic", f"sl-basic-{version}", *options, version=version)
    losses, tested = values(metrics, "train_mean_nll"), values(metrics, "test/nll")
    assert all(after < before for before, after in pairwise(losses)), losses
    assert tested[0] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.chaos
def test_dpo_begins_where_both_answers_are_as_likely_as_before_and_learns(recipes):
    options = ("dataset=hhh", "batch_size=16", "max_steps=6", "learning_rate=1e-3")
    metrics = recipes.run("preference.dpo.train", "dpo", *options)
    losses = values(metrics, "dpo_loss")
    # The reference is asked of the sampler, the policy of the trainer: they agree.
    assert losses[0] == pytest.approx(math.log(2), abs=AGREES)
    assert losses[-1] < 0.5 * losses[0]
    assert values(metrics, "accuracy")[-1] == 1


@pytest.mark.chaos
def test_rl_basic_raises_the_reward_and_samples_from_what_it_trains(recipes):
    offline.write_gsm8k(recipes.folder, 16)  # a batch is 16 samples of every question
    options = ("max_tokens=8", "num_epochs=3", *SMALL)
    metrics = recipes.run("rl_basic", "rl-basic", *options)
    rewards = values(metrics, "env/all/reward/total")
    assert rewards[-1] > rewards[0] + margin(samples=256, deviations=3.0), rewards
    assert all(abs(each) < AGREES for each in values(metrics, "optim/kl_sample_train_v1"))


@pytest.mark.chaos
@pytest.mark.parametrize(
    "mode",
    ["loss_fn=importance_sampling", "max_steps_off_policy=1 loss_fn=ppo", "loss_fn=gspo"],
)
def test_math_rl_trains_in_every_mode(recipes, mode):
    options = ("env=arithmetic", "groups_per_batch=4", "group_size=4", "max_tokens=5", *SMALL)
    log = f"math-{mode}".replace(" ", "-")
    metrics = recipes.run("math_rl.train", log, *options, *mode.split(), "max_steps=3")
    divergence = values(metrics, "optim/kl_sample_train_v2")
    assert len(divergence) == 3
    # What is a step old differs from what is trained.
    assert "off_policy" in mode or max(divergence) < AGREES**2, divergence


@pytest.mark.chaos
def test_on_policy_distillation_approaches_its_teacher(recipes, reinforced):
    teacher = recipes.checkpoints("rl")[-1]["sampler_path"]
    options = (
        f"teacher_model={offline.MODEL}",
        f"teacher_checkpoint={teacher}",
        "dataset=deepmath",
        "groups_per_batch=16",
        "group_size=16",
        "max_tokens=8",
        "max_steps=10",
        "lora_rank=8",
        "learning_rate=2e-3",
    )
    metrics = recipes.run("distillation.on_policy_distillation", "distil", *options)
    divergence = values(metrics, "teacher_kl")
    # 256 samples tell it to about a fifth: few of them say most of it.
    assert statistics.mean(divergence[-3:]) < 0.6 * statistics.mean(divergence[:3]), divergence


@pytest.mark.chaos
def test_rl_numerics_check_finds_no_difference_of_sampler_and_trainer(recipes):
    options = (
        "renderer_name=qwen3_instruct",  # that of the base has no tools
        "group_size=4",
        "groups_per_batch=4",
        "max_tokens=32",
        "max_steps=3",
        "task.num_pages_min=1",
        "task.num_pages_max=2",
        "task.page_chars=200",
        "task.reward_tolerance=2.0",
    )
    metrics = recipes.run("rl_numerics_check.train", "numerics", *options, *SMALL)
    assert all(abs(each) < AGREES for each in values(metrics, "optim/kl_sample_train_v1"))
    assert all(each < AGREES**2 for each in values(metrics, "optim/kl_sample_train_v2"))
    assert max(values(metrics, "grad_norm")) > 0  # so that it was asked of what was trained, too


@pytest.mark.chaos
def test_the_older_cookbook_trains_and_samples_too(recipes):
    options = ("batch_size=8", "max_steps=4", "save_every=2", *SMALL)
    losses = values(recipes.run("sl_loop", "sl-old", *options, version="0.5.8"), "train_mean_nll")
    assert losses[-1] < losses[0]
    options = ("batch_size=2", "group_size=4", "max_tokens=8", "max_steps=2", "save_every=1")
    rewards = recipes.run("rl_loop", "rl-old", *options, version="0.5.8")
    assert len(values(rewards, "reward/total")) == 2


@pytest.mark.chaos
def test_a_loss_without_a_public_formula_names_the_one_to_take(recipes):
    options = ("batch_size=4", "group_size=8", "max_tokens=8", "max_steps=2")
    recipes.run("rl_loop", "stable", *options, fails=True)
    said = recipes.output("stable")
    assert 'stable_reinforce is not served: its formula is not public (use loss_fn="import' in said
