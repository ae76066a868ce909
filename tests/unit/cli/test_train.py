"""`megatrain train` without ranks: its folder, history, trackers, hub, batches and loop."""

import os
import signal
import sys
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from megatrain.cli.train import hub, loop, trackers
from megatrain.cli.train.evaluation import Means
from megatrain.cli.train.folder import RunFolder
from megatrain.cli.train.history import History, plot, read_lines
from megatrain.cli.train.job import count_steps
from megatrain.cli.train.mesh import mesh_of
from megatrain.cli.train.progress import Progress
from megatrain.cli.train.recipes import RECIPES, loss_of
from megatrain.cli.train.reference import LossInputs, mismatch, row_key
from megatrain.config.run import parse
from megatrain.config.run.sections import ReportSection
from megatrain.errors import ConfigError, DataError, ExportError, LayoutError, StateError
from megatrain.parallel.layout import DeviceMesh
from megatrain.types import StepOutput


def configure(*overrides: str, recipe: str = "sft", output_dir: Path | str = "output"):
    values = {
        "recipe": recipe,
        "output_dir": str(output_dir),
        "model": {"id": "base", "mixed_precision": "no"},
        "data": {"train": [{"dataset_id": "rows.jsonl"}], "eval": [{"dataset_id": "rows.jsonl"}]},
    }
    return parse(values, overrides)


# --- output folder -------------------------------------------------------------------------------


def test_an_earlier_run_is_neither_mixed_with_nor_deleted_unless_asked(tmp_path):
    folder = RunFolder(tmp_path / "out")
    folder.prepare(overwrite=False, resume=False)
    (folder.root / "checkpoint-10").mkdir()
    (folder.root / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds an earlier run.*checkpoint-10"):
        folder.prepare(overwrite=False, resume=False)
    folder.prepare(overwrite=False, resume=True)
    assert (folder.root / "checkpoint-10").is_dir()
    folder.prepare(overwrite=True, resume=False)
    assert sorted(path.name for path in folder.root.iterdir()) == ["notes.txt"]


# --- history -------------------------------------------------------------------------------------


def history(path: Path, metric: str = "loss", **options) -> History:
    return History(path, best_metric=metric, greater_is_better=None, writes=True, **options)


def test_history_forgets_what_came_after_the_checkpoint(tmp_path):
    first = history(tmp_path / "metrics.jsonl")
    for step in range(1, 7):
        first.add({"step": step, "loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    again = history(tmp_path / "metrics.jsonl")
    again.go_back(4, source=tmp_path / "metrics.jsonl")
    again.add({"step": 5, "loss": 0.5})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert again.lines == read_lines(tmp_path / "metrics.jsonl")


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_lines(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("metric", "values", "since_best"),
    [
        ("loss", [3.0, 2.0, 2.5, 2.0], 2),
        ("rewards/accuracies", [0.5, 0.7, 0.6], 1),
        ("rewards/margins", [0.1, 0.2, 0.3], 0),
        ("loss", [float("nan"), 2.0], 0),
    ],
)
def test_the_best_evaluation_is_lowest_in_loss_and_highest_in_accuracy_and_margin(
    metric, values, since_best, tmp_path
):
    kept = history(tmp_path / "metrics.jsonl", metric)
    for step, value in enumerate(values):
        kept.add({"step": step, "eval_loss": 1.0, f"eval_{metric}": value})
    assert kept.evaluations_since_best() == since_best
    assert kept.last_is_best() == (since_best == 0)


def test_a_best_metric_that_the_loss_does_not_report_is_refused_with_those_it_does(tmp_path):
    kept = history(tmp_path / "metrics.jsonl", "acuracy")
    kept.add({"step": 1, "eval_loss": 1.0, "eval_accuracy": 0.5})
    with pytest.raises(ConfigError, match=r"'acuracy'\nhint: this loss has accuracy, loss"):
        kept.last_is_best()


def test_the_plot_is_an_image(tmp_path):
    kept = history(tmp_path / "metrics.jsonl")
    kept.add({"step": 1, "loss": 2.0})
    kept.add({"step": 1, "eval_loss": 1.0})
    plot(kept, tmp_path / "loss.png", title="sft")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_weighs_batches_by_what_they_are_means_over():
    means = Means()
    one = {"statistics": {"accuracy": 1.0}, "counts": {"accuracy": 1.0}}
    three = {"statistics": {"accuracy": 0.0}, "counts": {"accuracy": 3.0}}
    means.add(StepOutput(loss=4.0, logps=[], num_tokens=1, divisor=1.0, **one))
    means.add(StepOutput(loss=1.0, logps=[], num_tokens=5, divisor=5.0, **three))
    assert means.take() == {"loss": 1.5, "accuracy": 0.25}


# --- layout and recipes --------------------------------------------------------------------------


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


# --- reference -----------------------------------------------------------------------------------


class Scripted:
    """A model that answers forward_only with the sum of each datum's ids, or twice that as base."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, int]] = []

    def forward_only(self, *, inputs, adapter_name=None):
        self.asked.append((adapter_name, len(inputs)))
        factor = 2.0 if adapter_name == "" else 1.0
        data = []
        for row in inputs:
            sides = [key for key in row if key.endswith("input_ids")]
            data += [np.float32([factor * sum(row[side])]) for side in sides]
        return StepOutput(loss=0.0, logps=data)


def pair(*ids: int) -> dict:
    row = {}
    for side, value in zip(("chosen", "rejected"), ids, strict=True):
        row |= {f"{side}_input_ids": [value], f"{side}_labels": [value]}
    return row


def test_the_reference_of_a_row_is_computed_once_and_given_in_the_order_of_the_batch():
    model, loss = Scripted(), loss_of(configure(recipe="dpo"))
    inputs = LossInputs(model, loss, max_length=8)
    assert [float(v) for (v,) in inputs([pair(1, 2), pair(3, 4)])["ref_logps"]] == [2, 4, 6, 8]
    assert [float(v) for (v,) in inputs([pair(3, 4), pair(5, 6)])["ref_logps"]] == [6, 8, 10, 12]
    assert model.asked == [("", 2), ("", 1)]


def test_a_whole_model_has_no_reference_after_its_first_step():
    inputs = LossInputs(Scripted(), loss_of(configure(recipe="dpo")), max_length=8)
    inputs.prepare([[pair(1, 2)]])
    assert len(inputs([pair(1, 2)])["ref_logps"]) == 2
    with pytest.raises(StateError, match="no reference"):
        inputs([pair(3, 4)])


def test_a_prompt_is_given_the_answer_of_another_row():
    row = {"input_ids": [1, 2, 3, 9], "labels": [-100, -100, -100, 9]}
    other = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    assert mismatch(row, other, 8) == {
        "input_ids": [1, 2, 3, 6, 7],
        "labels": [-100, -100, -100, 6, 7],
    }
    assert mismatch(row, other, 4)["input_ids"] == [1, 2, 3, 6]


def test_the_reference_point_is_the_mean_over_answers_to_other_prompts():
    """Policy minus reference is minus the sum of ids: of (1, 20) and (10, 2) here."""
    rows = [
        {"input_ids": [1, 2], "labels": [-100, 2], "label": True},
        {"input_ids": [10, 20], "labels": [-100, 20], "label": False},
    ]
    inputs = LossInputs(Scripted(), loss_of(configure(recipe="kto")), max_length=8)(rows)
    assert inputs["kl"] == [-16.5, -16.5]


def test_rows_have_the_same_key_if_they_have_the_same_tokens_and_labels():
    row = {"input_ids": [1, 2], "labels": [-100, 2]}
    assert row_key(row) == row_key({**row, "length": 2})
    assert row_key(row) != row_key({**row, "labels": [1, 2]})


# --- trackers and hub ----------------------------------------------------------------------------


def test_a_tracker_without_its_package_is_refused_with_the_command_that_installs_it():
    trackers.check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match=r"wandb is not installed\nhint: pip install wandb"):
        trackers.check_trackers(["tensorboard", "wandb"])


def test_tensorboard_gets_every_metric(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = trackers.TensorBoard(
        project="p", run_name="r", folder=tmp_path, config={"train.batch_size": 8}
    )
    tracker.log({"loss": 2.0, "eval_rewards/margins": 0.5}, 3)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "r"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 2.0)]
    assert events.Scalars("eval_rewards/margins")[0].value == 0.5


class Recorder(types.ModuleType):
    """A package whose every function, and whatever that returns, writes down its call."""

    def __init__(self, name: str, calls: list) -> None:
        super().__init__(name)
        self.calls = calls

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **options):
            self.calls.append((name, args, options))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "starts", "sends", "ends"),
    [
        ("wandb", "init", "log", "finish"),
        ("mlflow", "start_run", "log_metrics", "end_run"),
        ("swanlab", "init", "log", "finish"),
    ],
)
def test_trackers_are_started_fed_and_closed(name, starts, sends, ends, tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, name, Recorder(name, calls))
    tracker = trackers.TRACKERS[name](
        project="mine", run_name="first", folder=tmp_path, config={"recipe": "sft"}
    )
    tracker.log({"loss": 2.0}, 3)
    tracker.close()
    assert [call[0] for call in calls if call[0] in (starts, sends, ends)] == [starts, sends, ends]
    assert (sends, ({"loss": 2.0},), {"step": 3}) in calls
    text = repr(calls)
    assert "mine" in text
    assert "first" in text
    assert "{'recipe': 'sft'}" in text


def test_nested_options_become_dotted_names():
    assert trackers.flatten({"train": {"lr": 1, "betas": [0.9]}, "recipe": "sft"}) == {
        "train.lr": 1,
        "train.betas": "[0.9]",
        "recipe": "sft",
    }


def test_a_push_that_cannot_work_is_refused_before_training(monkeypatch):
    from huggingface_hub import constants

    hub.check_hub(ReportSection())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="needs the network"):
        hub.check_hub(ReportSection(push_to_hub="owner/name"))
    with pytest.raises(ConfigError, match="owner/name of a repository"):
        hub.check_hub(ReportSection(push_to_hub="name"))
    with pytest.raises(ConfigError, match="pip install modelscope"):
        hub.check_hub(ReportSection(push_to_hub="owner/name", hub="modelscope"))


def test_a_push_sends_the_model_without_the_optimizer(tmp_path, monkeypatch):
    import huggingface_hub

    calls: list = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Recorder("api", calls))
    hub.push(tmp_path, ReportSection(push_to_hub="owner/name", hub_private=False))
    created, uploaded = calls
    assert created == ("create_repo", ("owner/name",), {"private": False, "exist_ok": True})
    assert uploaded[2]["folder_path"] == tmp_path
    assert uploaded[2]["ignore_patterns"] == ["state/*"]


def test_a_push_that_fails_says_that_the_folder_is_complete(tmp_path, monkeypatch):
    import huggingface_hub

    class Unreachable:
        def create_repo(self, *args, **options):
            raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    with pytest.raises(
        ExportError, match=r"is complete, and huggingface did not take it.*no route"
    ):
        hub.push(tmp_path, ReportSection(push_to_hub="owner/name"))


# --- the loop, with a model that only counts -----------------------------------------------------


class AloneRanks:
    """One rank."""

    is_first = True

    def largest(self, value: int) -> int:
        return value

    def wait(self) -> None:
        pass


class CountingModel:
    """Counts calls; its evaluation losses are scripted."""

    def __init__(self, losses=(1.0,)) -> None:
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.saved: list[str] = []
        self.losses = iter(losses)
        self.at_step = {}

    def forward_backward(self, *, inputs):
        self.calls["forward_backward"] += 1

    def clip_grad_and_step(self, *, max_grad_norm):
        self.calls["step"] += 1
        if callback := self.at_step.get(self.calls["step"]):
            callback()

    def calculate_metric(self, *, is_training):
        return {"loss": 2.0, "tokens": 10.0, "lr": 0.1}

    def forward_only(self, *, inputs):
        return StepOutput(loss=next(self.losses), logps=[], divisor=1.0)

    def save(self, name, *, output_dir, **options):
        self.saved.append(name)
        return str(Path(output_dir) / name)


class Loader(list):
    """Batches that are there already."""

    wait_seconds = 0.0

    def get_state(self):
        return {"consumed_train_samples": 0}


def counting_run(tmp_path, *overrides: str, losses=(1.0,), steps: int = 6) -> loop.Run:
    config = configure(*overrides, output_dir=tmp_path)
    return loop.Run(
        config=config,
        folder=RunFolder(tmp_path),
        ranks=AloneRanks(),
        model=CountingModel(losses),
        loader=Loader([["row"], ["row"], ["row"]]),
        eval_loader=Loader([["row"]]),
        loss_inputs=lambda batch: {},
        history=history(tmp_path / "metrics.jsonl"),
        progress=Progress(steps, first=0, shows=True),
        trackers=(),
        steps=steps,
    )


def test_a_run_steps_saves_and_evaluates_when_it_is_due(tmp_path, capsys):
    run = counting_run(
        tmp_path,
        "train.gradient_accumulation_steps=2",
        "train.save_every=4",
        "train.eval_every=3",
        losses=[1.0, 2.0],
    )
    assert loop.train(run) == 0
    assert run.model.calls == {"forward_backward": 12, "step": 6}
    assert run.model.saved == ["best", "checkpoint-4", "last"]
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line] == [
        (3, 1.0),
        (6, 2.0),
    ]
    assert lines[0]["epoch"] == pytest.approx(2 / 3, abs=1e-4)
    assert 0 <= lines[0]["data_wait"] <= 1
    assert (tmp_path / "loss.png").is_file()
    assert "step 6/6: loss 2.0000" in capsys.readouterr().err


def test_a_run_ends_early_when_evaluation_does_not_get_better(tmp_path):
    run = counting_run(
        tmp_path,
        "train.eval_every=1",
        "train.early_stop=2",
        losses=[3.0, 2.0, 2.5, 2.2, 1.0, 1.0],
    )
    assert loop.train(run) == 0
    assert run.done == 4
    assert run.model.saved == ["best", "best", "last"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_in_hand_with_a_checkpoint(number, tmp_path):
    run = counting_run(tmp_path)
    run.model.at_step[2] = lambda: os.kill(os.getpid(), number)
    before = signal.getsignal(number)
    assert loop.train(run) == 128 + number
    assert run.done == 2
    assert run.model.saved == ["last"]
    assert signal.getsignal(number) is before
