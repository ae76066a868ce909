"""quickstart's parts, without training anything."""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatrain.cli.quickstart import child, report, task
from megatrain.cli.quickstart.base_model import ROW_TOKENS, build_model, chat_rows, text_rows
from megatrain.cli.quickstart.command import add_parser, build_job, prepare_directory, run
from megatrain.cli.quickstart.job import BASE_MARKER, MARKER, Job
from megatrain.cli.quickstart.tokenizer import (
    build_tokenizer,
    encode_conversation,
    encode_prompt,
    encode_task,
)
from megatrain.errors import ConfigError, ExportError, LayoutError, StateError
from megatrain.parallel.layout import DeviceMesh
from megatrain.types import IGNORED_LABEL


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of the real size, trained on the task alone."""
    train, held_out = task.split()
    texts = [f"{question.text}\n{question.french}" for question in train + held_out]
    return build_tokenizer(texts * 3, vocab_size=600)


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["quickstart", *options])


def job(out: Path, **changes) -> Job:
    return Job(out=out, mesh=DeviceMesh(tp=2), **changes)


# the task


def test_the_task_is_a_few_hundred_different_conversations_the_same_every_time():
    train, held_out = task.split()
    assert (len(train), len(held_out)) == (400, 40)
    assert len({question.text for question in train + held_out}) == 440
    assert task.split() == (train, held_out)


def test_an_answer_is_about_what_was_asked():
    for question in task.split()[0]:
        word = question.english.removesuffix(".").removesuffix(" o'clock")
        (field,) = [field for field in task.FIELDS if field.ask in question.text]
        assert word in question.statement
        assert question.french == f"{field.words[word]} [{field.key}]"


def test_batches_are_the_same_for_one_seed_and_use_every_question_once_per_pass():
    train, _ = task.split()
    first, again, other = (task.Batches(train, size=16, seed=seed) for seed in (1, 1, 2))
    one_pass = [question for _ in range(25) for question in next(first)]
    assert sorted(q.text for q in one_pass) == sorted(q.text for q in train)
    assert [question for _ in range(25) for question in next(again)] == one_pass
    assert next(other) != one_pass[:16]


# tokens and labels


def test_labels_are_what_the_assistant_says_and_its_end_of_turn(tokenizer):
    question = task.split()[0][0]
    datum = encode_conversation(tokenizer, question.task_messages())
    labels = [label for label in datum["labels"] if label != IGNORED_LABEL]
    assert len(datum["labels"]) == len(datum["input_ids"])
    assert tokenizer.decode(labels) == question.french + "<|im_end|>"
    kept = [(t, i) for t, i in zip(datum["labels"], datum["input_ids"], strict=True) if t >= 0]
    assert all(label == token for label, token in kept)


def test_a_prompt_is_the_beginning_of_its_conversation_up_to_the_first_label(tokenizer):
    for question, datum in zip(
        task.split()[1], encode_task(tokenizer, task.split()[1]), strict=True
    ):
        prompt = encode_prompt(tokenizer, question.text)
        assert datum["input_ids"][: len(prompt)] == prompt
        assert all(label == IGNORED_LABEL for label in datum["labels"][: len(prompt)])
        assert datum["labels"][len(prompt)] != IGNORED_LABEL


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "août, naïve ünïcode 漢字 🙂\n\tdef f(): return 'x'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_base_learns_from_whole_rows(tokenizer):
    for rows in (text_rows(tokenizer, seed=0), chat_rows(tokenizer, seed=0)):
        ids, labels = next(rows)
        assert len(ids) == len(labels) == ROW_TOKENS
    assert IGNORED_LABEL in labels
    assert any(label >= 0 for label in labels)


@pytest.mark.parametrize("moe", [False, True])
def test_the_model_has_the_shape_that_options_are_checked_against(moe, tokenizer, tmp_path):
    shape = job(tmp_path, moe=moe).shape
    config = build_model(shape, tokenizer, seed=0).config
    assert config.model_type == ("qwen3_moe" if moe else "qwen3")
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.num_hidden_layers == shape.num_layers
    assert getattr(config, "num_experts", 0) == shape.num_experts


# options


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (["--tp", "3"], LayoutError, "--tp must divide the model's 4 attention heads: tp=3"),
        (["--pp", "3"], LayoutError, "--pp must divide the model's 4 layers: pp=3"),
        (["--ep", "2"], LayoutError, "--ep above 1 needs a model with experts: ep=2"),
        (["--ep", "4", "--moe"], LayoutError, "ep * etp must divide dp * cp * tp"),
        (["--tp", "0"], LayoutError, "tp=0"),
        (["--dp", "32"], LayoutError, "--dp must not exceed the 16 conversations"),
        (["--steps", "0"], ConfigError, "--steps must be at least 1: steps=0"),
        (["--seed", "-1"], ConfigError, "--seed must be between 0 and"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_created(
    options, kind, message, tmp_path
):
    out = tmp_path / "out"
    with pytest.raises(kind) as raised:
        run(parse("--out", str(out), *options))
    assert message in str(raised.value)
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--tp", "4"],
        ["--pp", "2", "--cp", "2"],
        ["--ep", "2", "--moe"],
        ["--tp", "1", "--dp", "2", "--ep", "2", "--moe"],
        ["--tp", "2", "--pp", "2", "--cp", "2", "--ep", "4", "--moe"],
    ],
)
def test_layouts_that_fit_are_accepted(options, tmp_path):
    assert build_job(parse("--out", str(tmp_path / "out"), *options)).mesh.world_size >= 2


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt"):
        build_job(parse("--out", str(tmp_path)))
    with pytest.raises(ConfigError, match="is a file"):
        build_job(parse("--out", str(tmp_path / "thesis.txt")))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_rerun_clears_results_and_keeps_the_base_and_what_others_put_there(tmp_path):
    first = job(tmp_path / "out")
    prepare_directory(first)
    first.base.mkdir()
    first.adapter.mkdir()
    first.metrics.write_text("{}\n")
    (first.out / "notes.txt").write_text("mine")
    prepare_directory(build_job(parse("--out", str(first.out))))
    assert {f.name for f in first.out.iterdir()} == {MARKER, "base", "logs", "notes.txt"}


def test_a_base_is_kept_only_when_it_is_complete_and_of_the_same_options(tmp_path):
    ours = job(tmp_path)
    ours.base.mkdir()
    (ours.base / BASE_MARKER).write_text(json.dumps(ours.base_fingerprint()))
    (ours.base / "tokenizer.json").touch()
    assert not ours.has_base()
    (ours.base / "model.safetensors").touch()
    assert ours.has_base()
    assert replace(ours, steps=7, mesh=DeviceMesh(pp=2)).has_base()
    assert not replace(ours, seed=1).has_base()
    assert not replace(ours, moe=True).has_base()


def test_a_job_is_read_as_it_was_written(tmp_path):
    ours = job(tmp_path / "out", moe=True, steps=3)
    assert Job.read(prepare_directory(ours)) == ours


def test_the_command_imports_no_torch():
    code = "import sys, megatrain.cli.quickstart.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# processes


def fail_in_child(tmp_path: Path, statement: str) -> str:
    code = f"""
import pathlib, sys
from megatrain.cli.quickstart.child import report_failure
from megatrain.errors import LayoutError
with report_failure(pathlib.Path({str(tmp_path)!r}), name="rank 1"):
    {statement}
"""
    command = [sys.executable, "-c", code]
    with pytest.raises(Exception) as raised:
        child.run_child(command, name="train", logs=tmp_path, progress=None)
    return f"{type(raised.value).__name__}: {raised.value}"


def test_a_failed_child_is_told_with_its_rank_and_traceback(tmp_path):
    message = fail_in_child(tmp_path, "1 / 0")
    assert message.startswith("ChildFailedError: rank 1 failed\nTraceback")
    assert "ZeroDivisionError" in message
    assert str(tmp_path) in message


def test_a_users_mistake_in_a_child_keeps_its_kind_and_hint(tmp_path):
    message = fail_in_child(tmp_path, "raise LayoutError('no: tp=3', hint='take 2')")
    assert message == "LayoutError: rank 1: no: tp=3\nhint: take 2"


def test_a_child_that_fails_before_it_can_report_is_told_with_its_first_traceback(tmp_path):
    command = [sys.executable, "-c", "print('noise'); import no_such_module"]
    with pytest.raises(child.ChildFailedError) as raised:
        child.run_child(command, name="base", logs=tmp_path, progress=None)
    assert "noise" not in str(raised.value)
    assert "no_such_module" in str(raised.value)


def test_a_child_that_stands_still_is_ended_and_named(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    options = {"logs": tmp_path, "progress": None, "stall_timeout_s": 0.3}
    with pytest.raises(child.ChildFailedError, match=r"train must make progress within 0\.3 s"):
        child.run_child(command, name="train", **options)


def test_a_child_without_a_limit_may_stand_still(tmp_path):
    marker = tmp_path / "done"
    code = f"import time; time.sleep(0.5); open({str(marker)!r}, 'w').close()"
    options = {"logs": tmp_path, "progress": None, "stall_timeout_s": None}
    child.run_child([sys.executable, "-c", code], name="slow", **options)
    assert marker.exists()


def test_progress_is_told_in_lines_where_there_is_no_terminal(tmp_path, capsys):
    progress = child.Progress("train", tmp_path / "metrics.jsonl", 2)
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "tokens_per_second": 1234.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    code = f"open({str(progress.file)!r}, 'w').write({text!r})"
    child.run_child([sys.executable, "-c", code], name="x", logs=tmp_path, progress=progress)
    assert capsys.readouterr().err == "train 2/2: loss 1.000, 1,234 tokens/s\n"


# the report


def metrics(*losses: float) -> list[dict[str, float]]:
    return [
        {"step": step, "loss": loss, "label_tokens": 10, "tokens": 100, "seconds": 0.5}
        for step, loss in enumerate(losses, start=1)
    ]


def make_report(tmp_path: Path, losses: list[float], difference: float = 1e-7) -> report.Report:
    samples = [{"question": "q", "wanted": "w", "before": "b", "after": "w"}]
    ours = job(tmp_path, steps=len(losses))
    return report.build_report(ours, metrics(*losses), samples, difference=difference, seconds=1.0)


def test_first_and_last_are_means_over_label_tokens_of_five_steps_or_fewer(tmp_path):
    made = make_report(tmp_path, [6, 5, 4, 3, 2, 1])
    assert (made.loss_first, made.loss_last) == (4, 3)
    assert make_report(tmp_path, [2.0, 1.0]).loss_first == 1.5
    uneven = metrics(1.0, 4.0)
    uneven[0]["label_tokens"] = 20
    assert report.mean_loss(uneven) == 2.0
    assert (made.tokens_per_second, made.correct_before, made.correct_after) == (200, 0, 1)


def test_the_report_file_has_what_was_promised(tmp_path):
    made = make_report(tmp_path, [2.0, 1.0])
    made.write(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["layout"]["tp"] == 2
    assert found["versions"]["torch"]
    assert found["adapter_path"] == str(tmp_path / "adapter")
    assert {"max_logprob_difference", "tokens_per_second", "seed", "steps"} <= set(found)


def test_a_loss_that_did_not_fall_is_an_error(tmp_path):
    report.check_report(make_report(tmp_path, [6, 5, 4, 3, 2, 1]))
    with pytest.raises(StateError, match=r"the loss must fall: first 2\.0000, last 2\.0000"):
        report.check_report(make_report(tmp_path, [2.0]))


@pytest.mark.parametrize("difference", [1.1e-5, math.inf, math.nan])
def test_an_export_that_does_not_verify_is_an_error(difference, tmp_path):
    with pytest.raises(ExportError, match="must give the trainer's log-probabilities"):
        report.check_report(make_report(tmp_path, [6, 5, 4, 3, 2, 1], difference))


def test_the_plot_is_a_picture(tmp_path):
    report.plot_loss(metrics(3.0, 2.0, 1.0), tmp_path / "loss.png", title="a title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert report.smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert report.smooth([4.0, 0.0])[0] == pytest.approx(4.0)
