"""`megatrain train` on ranks: recipes learn, runs resume on other layouts, signals and mistakes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatrain.cli.train.history import read_lines
from megatrain.parallel.layout import DeviceMesh
from tests.fixtures.small_model import make_small_model
from tests.multiprocess.train_tasks import train

pytestmark = pytest.mark.multiprocess

TP2_PP2 = DeviceMesh(tp=2, pp=2)
CP2_DP2 = DeviceMesh(cp=2, dp=2)
NUMBERS = ("one", "two", "three", "four", "five", "six")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of rows of every kind."""
    folder, order = tmp_path_factory.mktemp("rows"), random.Random(0)
    chats, pairs, rated = [], [], []
    for number in range(24):
        prompt = " ".join(order.choices(NUMBERS, k=order.randint(2, 9)))
        good, bad = "I am a small model.", "Who are you? two"
        turn = {"role": "user", "content": prompt}
        messages = [turn, {"role": "assistant", "content": good}]
        chats.append({"messages": messages})
        pairs.append({"prompt": prompt, "chosen": good, "rejected": bad})
        wanted = number % 2 == 0
        rated.append({"prompt": prompt, "completion": good if wanted else bad, "label": wanted})
    write(folder / "chats.jsonl", chats)
    write(folder / "pairs.jsonl", pairs)
    write(folder / "ratings.jsonl", rated)
    write(folder / "texts.jsonl", [{"text": chat["messages"][0]["content"]} for chat in chats])
    return folder


def settings(base: Path, rows: Path, out: Path, recipe: str = "sft") -> dict:
    return {
        "recipe": recipe,
        "output_dir": str(out),
        "platform": "cpu",
        "model": {"id": str(base), "mixed_precision": "no"},
        "lora": {"r": 8, "lora_alpha": 16},
        "data": {"train": [{"dataset_id": str(rows)}], "max_length": 128},
        "optimizer": {"lr": 5e-3},
        "schedule": {"name": "none"},
        "train": {"batch_size": 8, "max_steps": 9},
    }


def lines_of(out: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_lines(out / "metrics.jsonl") if key in line]


def mean_of_ends(values: list[float], count: int = 3) -> tuple[float, float]:
    """Return the means of the first and the last few values."""
    return float(np.mean(values[:count])), float(np.mean(values[-count:]))


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


def test_a_reward_model_learns_which_answer_is_better(base, data, tmp_path, ranks):
    values = settings(base, data / "pairs.jsonl", tmp_path, "rm")
    ranks.run(train, DeviceMesh(tp=2), values)
    assert lines_of(tmp_path)[-1] < lines_of(tmp_path)[0]
    assert mean_of_ends(lines_of(tmp_path, "accuracy"))[1] == 1.0


def test_a_student_follows_its_teacher(base, data, tmp_path, ranks):
    """The teacher says one token with certainty: the answer's own, so the loss is -log p."""
    from megatrain.data.template.base import Template

    template = Template(str(base))
    taught = []
    for line in (data / "chats.jsonl").read_text().splitlines():
        row = json.loads(line)
        encoded = template.encode(row)
        labels = [label for label in encoded["labels"][1:] if label != -100]
        row["teacher_tokens"] = [[label, (label + 1) % 300] for label in labels]
        row["teacher_logps"] = [[-0.01, -5.0]] * len(labels)
        taught.append(row)
    rows = write(tmp_path / "taught.jsonl", taught)
    ranks.run(train, DeviceMesh(dp=2), settings(base, rows, tmp_path / "out", "distill"))
    first, last = mean_of_ends(lines_of(tmp_path / "out"))
    assert last < 0.8 * first


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


@pytest.mark.parametrize(
    ("first", "second"), [(TP2_PP2, DeviceMesh()), (DeviceMesh(), CP2_DP2)], ids=str
)
def test_a_run_goes_on_from_another_layout_as_if_it_had_never_stopped(
    first, second, base, data, tmp_path, ranks
):
    """Within 1e-5: the layouts' sums of float32 numbers differ in their order."""
    straight, stopped = (
        settings(base, data / "chats.jsonl", tmp_path / name) for name in ("straight", "stopped")
    )
    options = ["optimizer.lr=1e-4", "train.max_steps=6", "train.gradient_accumulation_steps=2"]
    ranks.run(train, DeviceMesh(), straight, options)
    ranks.run(train, first, stopped, [*options, "train.max_steps=3"])
    ranks.run(train, second, stopped, [*options, "train.resume=auto"])
    np.testing.assert_allclose(
        lines_of(tmp_path / "stopped"), lines_of(tmp_path / "straight"), rtol=0, atol=1e-5
    )
    assert lines_of(tmp_path / "stopped", "step") == [1, 2, 3, 4, 5, 6]


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


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatrain", "train", str(config), *arguments]


def write_config(values: dict, path: Path) -> Path:
    """Write TOML; JSON's strings, numbers and booleans are TOML's too."""
    lines = [f"{key} = {json.dumps(v)}" for key, v in values.items() if not isinstance(v, dict)]
    for name, section in values.items():
        if isinstance(section, dict):
            plain = {key: v for key, v in section.items() if not isinstance(v, list)}
            lines += [f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in plain.items())]
            for source in section.get("train", []):
                lines += [f"[[{name}.train]]"]
                lines += [f"{key} = {json.dumps(v)}" for key, v in source.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_saves_and_ends_and_the_run_goes_on(base, data, tmp_path):
    out = tmp_path / "out"
    config = write_config(settings(base, data / "chats.jsonl", out), tmp_path / "run.toml")
    options = ["--nproc", "2"]
    running = subprocess.Popen(command(config, *options, "--set", "train.max_steps=100000"))
    try:
        deadline = time.monotonic() + 300
        while len(read_lines(out / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) == 143
    finally:
        running.kill()
    done = len(lines_of(out))
    assert done >= 3
    assert (out / "last" / "adapter_model.safetensors").is_file()
    more = [*options, "--set", f"train.max_steps={done + 2}", "--set", "train.resume=auto"]
    subprocess.run(command(config, *more), check=True)
    assert lines_of(out, "step") == list(range(1, done + 3))


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
