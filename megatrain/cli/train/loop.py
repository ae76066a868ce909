"""The loop of a run: step, tell, evaluate, save; the same on every rank.

train(run)     until all steps are done, a signal comes, or evaluation does not get better
run.step()     gradient_accumulation_steps batches, one optimizer step
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatrain.cli.train.evaluation import evaluate
from megatrain.cli.train.folder import BEST, LAST, RunFolder
from megatrain.cli.train.history import History, Line, plot
from megatrain.cli.train.hub import push
from megatrain.cli.train.progress import Progress, describe
from megatrain.cli.train.ranks import Ranks
from megatrain.cli.train.reference import LossInputs
from megatrain.cli.train.stop import StopRequest
from megatrain.cli.train.trackers import Tracker
from megatrain.config.run import RunConfig
from megatrain.export.state.retention import prune

Batch = Sequence[Mapping[str, Any]]


@dataclass(kw_only=True)
class Run:
    """What one run consists of, on this rank."""

    config: RunConfig
    folder: RunFolder
    ranks: Ranks
    model: Any
    loader: Any
    """Training batches; knows how many rows it has handed out."""
    eval_loader: Any | None
    loss_inputs: LossInputs
    history: History
    progress: Progress
    trackers: Sequence[Tracker]
    steps: int
    """Optimizer steps of the whole run."""
    done: int = 0
    """Optimizer steps so far."""
    clock: "Clock" = field(default_factory=lambda: Clock())

    @property
    def batches_per_epoch(self) -> int | None:
        """Calls of forward_backward in one pass over the data; None for a stream."""
        return None if self.config.data.streaming else len(self.loader)


class Clock:
    """Seconds of steps since they were last told, and how many of them went by waiting for data."""

    def __init__(self) -> None:
        self._seconds = self._waited = 0.0

    def add(self, seconds: float, *, waited: float) -> None:
        """Count one step."""
        self._seconds += seconds
        self._waited += waited

    def take(self, tokens: float) -> Line:
        """Return tokens_per_second, seconds and data_wait (a share), and start anew."""
        line = {
            "tokens_per_second": tokens / self._seconds,
            "seconds": self._seconds,
            "data_wait": self._waited / self._seconds,
        }
        self._seconds = self._waited = 0.0
        return line


def train(run: Run) -> int:
    """Train to the end; return 0, or 128 + the signal that ended it after saving.  Collective."""
    section, stream = run.config.train, endless(run)
    with StopRequest() as stop:
        while run.done < run.steps:
            step(run, stream)
            if section.eval_every and run.done % section.eval_every == 0:
                evaluate_now(run)
                if is_worse_for_long(run):
                    run.progress.say(f"no better {section.best_metric} for {section.early_stop}")
                    break
            if signal := run.ranks.largest(stop.signal):
                save(run, LAST)
                run.progress.say(f"stopped by signal {signal}; {run.folder.root / LAST} is saved")
                return 128 + signal
            if section.save_every and run.done % section.save_every == 0:
                save(run, f"checkpoint-{run.done}", background=section.background_save)
                keep_newest(run)
        finish(run)
    return 0


def endless(run: Run) -> Iterator[Batch]:
    """Yield training batches over and over; each pass has its own order."""
    while True:
        empty = True
        for batch in run.loader:
            empty = False
            yield batch
        assert not empty, "the loader has no batch"


def step(run: Run, stream: Iterator[Batch]) -> None:
    """Take one optimizer step, and tell it when it is due.  Collective."""
    section, start, waited = run.config.train, time.perf_counter(), run.loader.wait_seconds
    for _ in range(section.gradient_accumulation_steps):
        batch = next(stream)
        run.model.forward_backward(inputs=batch, **run.loss_inputs(batch))
    run.model.clip_grad_and_step(max_grad_norm=section.max_grad_norm)
    run.done += 1
    waited = run.loader.wait_seconds - waited
    run.clock.add(time.perf_counter() - start, waited=waited)
    line = None
    if run.done % section.log_every == 0 or run.done == run.steps:
        line = _training_line(run)
        run.history.add(line)
        for tracker in run.trackers:
            tracker.log(without_step(line), run.done)
    run.progress.step(run.done, line)


def _training_line(run: Run) -> Line:
    metric = dict(run.model.calculate_metric(is_training=True))
    metric |= run.clock.take(metric["tokens"]) | {"step": run.done}
    if run.batches_per_epoch is not None:
        calls = run.done * run.config.train.gradient_accumulation_steps
        metric["epoch"] = round(calls / run.batches_per_epoch, 4)
    first = ("step", "epoch", "loss")
    return {key: metric[key] for key in [*(k for k in first if k in metric), *metric]}


def evaluate_now(run: Run) -> None:
    """Evaluate, tell, and save `best` if it is.  Collective."""
    if run.eval_loader is None:
        return
    metrics = evaluate(run.model, run.eval_loader, run.loss_inputs)
    run.history.add({"step": run.done, **metrics})
    for tracker in run.trackers:
        tracker.log(metrics, run.done)
    shown = describe({key.removeprefix("eval_"): value for key, value in metrics.items()})
    run.progress.say(f"step {run.done}/{run.steps}: evaluation: {shown}")
    if run.history.last_is_best():
        run.model.save(BEST, output_dir=run.folder.root)


def is_worse_for_long(run: Run) -> bool:
    """Tell whether `early_stop` evaluations in a row were no better than the best."""
    patience = run.config.train.early_stop
    return patience is not None and run.history.evaluations_since_best() >= patience


def save(run: Run, name: str, *, background: bool = False) -> str:
    """Save a checkpoint that can be resumed.  Collective."""
    path: str = run.model.save(
        name,
        output_dir=run.folder.root,
        save_optimizer=True,
        consumed_train_samples=run.loader.get_state()["consumed_train_samples"],
        background=background,
    )
    return path


def keep_newest(run: Run) -> None:
    """Delete older checkpoints; one that is still being written does not count yet."""
    keep = run.config.train.keep
    if keep is not None and run.ranks.is_first:
        prune(run.folder.root, keep, spare=(BEST, LAST))


def finish(run: Run) -> None:
    """Evaluate, save `last`, draw the plot, push to the hub.  Collective."""
    evaluations = run.history.evaluations
    if not evaluations or evaluations[-1]["step"] != run.done:
        evaluate_now(run)
    path = save(run, LAST)
    keep_newest(run)
    report = run.config.report
    if run.ranks.is_first:
        plot(run.history, run.folder.plot, title=f"{run.config.recipe}: {run.config.model.id}")
        run.progress.say(f"done after {run.done} steps: {path}")
        if report.push_to_hub is not None:
            run.progress.say(f"pushed to {push(run.folder.root / LAST, report)}")
    run.ranks.wait()


def without_step(line: Line) -> Line:
    """Return a line as trackers take it: the step is an argument of its own."""
    return {key: value for key, value in line.items() if key != "step"}
