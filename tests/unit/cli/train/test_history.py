"""metrics.jsonl, the best evaluation and the plot."""

from pathlib import Path

import pytest

from megatrain.cli.train.evaluation import Means
from megatrain.cli.train.history import History, plot, read_lines
from megatrain.errors import ConfigError, DataError
from megatrain.types import StepOutput


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
