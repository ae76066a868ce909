"""`megatrain train` on ranks: recipes learn, runs resume on other layouts, signals and mistakes."""

import os
import subprocess

import numpy as np
import pytest

from megatrain.cli.train.history import read_lines
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess.train_settings import (
    CP2_DP2,
    FILES,
    TP2_PP2,
    command,
    lines_of,
    mean_of_ends,
    settings,
    write_config,
)
from tests.multiprocess.train_tasks import dry_run_errors, train, train_error, train_errors

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize(
    ("recipe", "file", "mesh"),
    [
        ("pt", "texts.jsonl", TP2_PP2),
        ("sft", "chats.jsonl", CP2_DP2),
        ("dpo", "pairs.jsonl", TP2_PP2),
        ("kto", "ratings.jsonl", CP2_DP2),
    ],
)
def test_a_recipe_learns_on_four_ranks(recipe, file, mesh, base, data, tmp_path, ranks):
    values = settings(base, data / file, tmp_path, recipe)
    ranks.run(train, mesh, values)
    first, last = mean_of_ends(lines_of(tmp_path))
    assert last < 0.9 * first
    if recipe == "dpo":
        first, last = mean_of_ends(lines_of(tmp_path, "rewards/margins"))
        assert last > first + 0.1


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_reward_model_learns_which_answer_is_better(full, base, data, tmp_path, ranks):
    values = settings(base, data / "pairs.jsonl", tmp_path, "rm")
    if full:
        del values["lora"]
    ranks.run(train, DeviceMesh(tp=2), values, [f"full={str(full).lower()}"])
    assert lines_of(tmp_path)[-1] < lines_of(tmp_path)[0]
    first, last = mean_of_ends(lines_of(tmp_path, "accuracy"))
    assert last > first
    assert last == 1.0


def test_a_student_follows_its_teacher(base, data, tmp_path, ranks):
    """The teacher says one token with certainty: the answer's own, so the loss is -log p."""
    rows = data / "taught.jsonl"
    ranks.run(train, DeviceMesh(dp=2), settings(base, rows, tmp_path, "distill"))
    first, last = mean_of_ends(lines_of(tmp_path))
    assert last < 0.8 * first


@pytest.mark.parametrize("recipe", FILES)
def test_evaluation_reports_the_loss_that_is_trained(recipe, base, data, tmp_path, ranks):
    """All rows in one step that moves nothing: evaluation on the same rows must say the same."""
    values = settings(base, data / FILES[recipe], tmp_path, recipe)
    values["data"]["eval"] = values["data"]["train"]
    options = ["optimizer.lr=1e-12", "train.max_steps=1", "train.batch_size=24"]
    ranks.run(train, DeviceMesh(dp=2), values, options)
    assert lines_of(tmp_path, "eval_loss") == pytest.approx(lines_of(tmp_path), abs=1e-6)
    statistics = {key for line in read_lines(tmp_path / "metrics.jsonl") for key in line}
    own = {"rm": "accuracy", "dpo": "rewards/margins"}.get(recipe)
    assert own is None or {own, f"eval_{own}"} <= statistics


def test_a_whole_model_is_its_own_reference_as_it_was_before_the_first_step(
    base, data, tmp_path, ranks
):
    values = settings(base, data / "pairs.jsonl", tmp_path, "dpo")
    del values["lora"]
    options = ["full=true", "optimizer.lr=1e-3", "train.max_steps=6"]
    ranks.run(train, DeviceMesh(tp=2), values, options)
    margins = lines_of(tmp_path, "rewards/margins")
    assert margins[0] == pytest.approx(0.0, abs=1e-4)  # policy and reference are the same
    assert margins[-1] > 0.1
    assert (tmp_path / "last" / "config.json").is_file()


def test_a_whole_model_learns_from_ratings(base, data, tmp_path, ranks):
    values = settings(base, data / FILES["kto"], tmp_path, "kto")
    del values["lora"]
    values["data"]["eval"] = values["data"]["train"]
    options = ["full=true", "optimizer.lr=1e-3", "train.eval_every=3"]
    ranks.run(train, DeviceMesh(dp=2), values, options)
    losses = lines_of(tmp_path, "eval_loss")
    assert lines_of(tmp_path)[0] == pytest.approx(0.5, abs=1e-5)  # KTO where nothing has moved
    assert losses == sorted(losses)[::-1]
    assert losses[-1] < 0.9 * lines_of(tmp_path)[0]
    assert len(set(lines_of(tmp_path, "kl"))) > 1


def test_the_loss_curve_is_the_same_on_every_layout(base, data, tmp_path, ranks):
    """Within 1e-5 over 20 steps: only the order of float32 sums differs."""
    curves = []
    for name, mesh in (("one", DeviceMesh()), ("tp2pp2", TP2_PP2), ("cp2dp2", CP2_DP2)):
        values = settings(base, data / "chats.jsonl", tmp_path / name)
        ranks.run(train, mesh, values, ["optimizer.lr=1e-4", "train.max_steps=20"])
        curves.append(lines_of(tmp_path / name))
    assert len(curves[0]) == 20
    np.testing.assert_allclose(curves[1], curves[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=0, atol=1e-5)


def test_only_the_newest_checkpoints_are_kept_and_the_best_is_apart(base, data, tmp_path, ranks):
    values = settings(base, data / "chats.jsonl", tmp_path)
    values["data"]["eval"] = values["data"]["train"]
    options = ["train.max_steps=5", "train.save_every=1", "train.keep=2", "train.eval_every=2"]
    ranks.run(train, DeviceMesh(dp=2), values, options)
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["best", "checkpoint-4", "checkpoint-5", "last"]
    assert lines_of(tmp_path, "eval_loss") == sorted(lines_of(tmp_path, "eval_loss"))[::-1]
    assert (tmp_path / "best" / "adapter_model.safetensors").is_file()


def test_a_processor_of_ones_own_makes_the_inputs(base, data, tmp_path, ranks):
    values = settings(base, data / "chats.jsonl", tmp_path)
    values["processor"] = {"name": "tests.multiprocess.train_tasks:LastLabels", "count": 3}
    ranks.run(train, DeviceMesh(dp=2), values, ["train.max_steps=2"])
    assert lines_of(tmp_path, "label_tokens") == [8 * 3, 8 * 3]
    assert all(0 < mfu < 1 for mfu in lines_of(tmp_path, "mfu"))


def test_streams_of_several_sources_are_mixed_by_weight(base, data, tmp_path, ranks):
    values = settings(base, data / "chats.jsonl", tmp_path)
    values["data"] |= {
        "train": [
            {"dataset_id": str(data / "chats.jsonl"), "weight": 3.0},
            {"dataset_id": str(data / "chats.jsonl"), "weight": 1.0, "data_slice": [0, 8]},
        ],
        "streaming": True,
    }
    ranks.run(train, DeviceMesh(dp=2), values)
    assert len(lines_of(tmp_path)) == 9
    assert lines_of(tmp_path)[-1] < lines_of(tmp_path)[0]


MISTAKES = {
    "train.best_metric=acuracy": "did you mean 'token_accuracy'",
    "optimizer.weigth_decay=0.1": "did you mean 'weight_decay'",
    "optimizer=Adamw": "did you mean 'AdamW'",
    "schedule={ name = 'cosine', num_warmup_step = 1 }": "did you mean 'num_warmup_steps'",
    "processor.name=Nope": "unknown processor 'Nope'",
    "model_patches=[{ name = 'Nope' }]": "unknown patch 'Nope'",
    "data.preprocessor.name=MessageProcessor": "did you mean 'MessagesProcessor'",
    "data.eval=[{ dataset_id = 'nope.jsonl' }]": "nope.jsonl",
}


@pytest.mark.parametrize("task", [train_errors, dry_run_errors])
def test_a_mistake_is_named_before_a_row_or_a_weight_is_read(task, base, data, tmp_path, ranks):
    """There are no rows to train on, so whatever is said was found before they were looked for."""
    values = settings(base, data / "missing.jsonl", tmp_path)
    found = ranks.run(task, None, values, [[mistake] for mistake in MISTAKES])[0]
    for (mistake, message), (kinds, text) in zip(MISTAKES.items(), found, strict=True):
        assert "MegatrainError" in kinds, mistake
        assert message in text, mistake


def test_bad_rows_end_a_run_or_are_left_out_as_the_configuration_says(base, data, tmp_path, ranks):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((data / "chats.jsonl").read_text() + '{"messages": []}\nnonsense\n')
    values = settings(base, rows, tmp_path / "out")
    values["data"]["eval"] = values["data"]["train"]
    kinds, text = ranks.run(train_error, None, values)[0]
    assert "DataError" in kinds
    assert "rows.jsonl, line 2" in text
    assert "[data]" in text
    ranks.run(train, None, values, ["data.on_error=skip", "train.max_steps=3"])
    assert lines_of(tmp_path / "out", "epoch") == [0.3333, 0.6667, 1]  # of 24 rows, 8 a batch


def test_patches_change_the_model_before_it_is_trained(base, data, tmp_path, ranks):
    patch = "tests.multiprocess.train_tasks:ScaledEmbedding"
    losses = {}
    for name, factor in (("none", None), ("one", 1.0), ("three", 3.0)):
        values = settings(base, data / "chats.jsonl", tmp_path / name)
        values["model_patches"] = [{"name": patch, "factor": factor}] if factor else []
        ranks.run(train, DeviceMesh(tp=2), values, ["train.max_steps=1"])
        losses[name] = lines_of(tmp_path / name)[0]
    assert losses["one"] == losses["none"]
    assert abs(losses["three"] - losses["none"]) > 1e-3
    values["model_patches"] = [{"name": patch, "facto": 3.0}]
    assert "did you mean 'factor'" in ranks.run(train_error, None, values)[0][1]
    values["model_patches"] = [{"name": str(tmp_path / "patch.py:Own")}]
    assert "trust_remote_code" in ranks.run(train_error, None, values)[0][1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_mistake_in_the_data_is_one_message_with_file_and_line(base, data, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((data / "chats.jsonl").read_text() + '{"messages": []}\n')
    config = write_config(settings(base, rows, tmp_path / "out"), tmp_path / "run.toml")
    done = subprocess.run(
        command(config, "--nproc", "2"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "rows.jsonl, line 25" in done.stderr
    assert done.stderr.count("DataError") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_prints_layout_batches_and_memory_and_writes_nothing(base, data, tmp_path):
    values = settings(base, data / "chats.jsonl", tmp_path / "out") | {"mesh": {"tp": 2}}
    config = write_config(values, tmp_path / "run.toml")
    done = subprocess.run(
        command(config, "--nproc", "4", "--dry-run", "--set", "model.max_tokens_per_microbatch=64"),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    assert "tp2" in done.stdout
    assert "24 rows, 3 batches of 8 an epoch" in done.stdout
    assert "9 optimizer steps" in done.stdout
    assert "of at most 64 tokens" in done.stdout
    assert "memory of a rank" in done.stdout
    assert not (tmp_path / "out").exists()
