"""The loop, with a model that only counts."""

import os
import signal
from collections import defaultdict
from pathlib import Path

import pytest

from megatrain.cli.train import loop
from megatrain.cli.train.folder import RunFolder
from megatrain.cli.train.history import History, read_lines
from megatrain.cli.train.progress import Progress
from megatrain.types import StepOutput
from tests.fixtures.run_config import configure


def history(path: Path, metric: str = "loss", **options) -> History:
    return History(path, best_metric=metric, greater_is_better=None, writes=True, **options)


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

    def __init__(self, batches, on_batch=lambda number: None) -> None:
        super().__init__(batches)
        self.on_batch = on_batch

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            self.on_batch(number)
            yield batch

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
    assert (tmp_path / "loss.png").is_file()
    assert signal.getsignal(number) is before


def test_steps_that_were_not_told_yet_are_told_when_a_signal_ends_the_run(tmp_path):
    run = counting_run(tmp_path, "train.log_every=5")
    run.model.at_step[3] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    loop.train(run)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [3]


def test_steps_that_were_not_told_yet_are_told_when_a_run_ends_early(tmp_path):
    options = ("train.log_every=5", "train.eval_every=1", "train.early_stop=1")
    run = counting_run(tmp_path, *options, losses=[1.0, 2.0])
    assert loop.train(run) == 0
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2]
    assert (tmp_path / "loss.png").is_file()


@pytest.mark.parametrize(("every", "steps_done"), [(2, 2), (100, 6)])
def test_a_signal_ends_a_long_evaluation(every, steps_done, tmp_path):
    """During an evaluation between steps, and during the last one."""
    run = counting_run(tmp_path, f"train.eval_every={every}", losses=[1.0] * 9)
    seen = []

    def stop_at_second(number: int) -> None:
        seen.append(number)
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    run.eval_loader = Loader([["row"]] * 9, stop_at_second)
    assert loop.train(run) == 143
    assert seen == [0, 1]
    assert run.done == steps_done
    assert run.model.saved == ["last"]
    assert not [line for line in read_lines(tmp_path / "metrics.jsonl") if "eval_loss" in line]
