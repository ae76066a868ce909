"""The loop of a run: step, tell, evaluate, save; the same on every rank.

train(run)     until all steps are done, a signal comes, or evaluation does not get better
step(run)      gradient_accumulation_steps batches, one optimizer step
"""

import time
from collections.abc import Iterator

from megatrain.cli.train.checkpoints import keep_newest, save
from megatrain.cli.train.evaluation import evaluate
from megatrain.cli.train.folder import BEST, LAST
from megatrain.cli.train.history import Line, plot
from megatrain.cli.train.hub import push
from megatrain.cli.train.progress import describe
from megatrain.cli.train.run import Batch as Batch
from megatrain.cli.train.run import Clock as Clock
from megatrain.cli.train.run import Run as Run


def train(run: Run) -> int:
    """Train to the end; return 0, or 128 + the signal that ended it after saving.  Collective."""
    with run.stop:
        signal = run_steps(run) or finish(run)
        if signal:
            end_early(run, signal)
            return 128 + signal
        complete(run)
    return 0


def run_steps(run: Run) -> int:
    """Take the steps that are left; return the signal that ended them, 0 if none did."""
    section, stream = run.config.train, endless(run)
    while run.done < run.steps:
        step(run, stream)
        if section.eval_every and run.done % section.eval_every == 0:
            evaluate_now(run)
        if signal := run.stop_signal():
            return signal
        if is_worse_for_long(run):
            run.progress.say(f"no better {section.best_metric} for {section.early_stop}")
            break
        if section.save_every and run.done % section.save_every == 0:
            save(run, f"checkpoint-{run.done}", background=section.background_save)
            keep_newest(run)
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
        line = tell(run)
    run.progress.step(run.done, line)


def tell(run: Run) -> Line:
    """Write the metrics of the steps since the last time."""
    line = _training_line(run)
    run.history.add(line)
    for tracker in run.trackers:
        tracker.log(without_step(line), run.done)
    return line


def _training_line(run: Run) -> Line:
    metric = dict(run.model.calculate_metric(is_training=True))
    metric |= run.clock.take(metric["tokens"]) | {"step": run.done}
    if run.batches_per_epoch is not None:
        calls = run.done * run.config.train.gradient_accumulation_steps
        metric["epoch"] = round(calls / run.batches_per_epoch, 4)
    first = ("step", "epoch", "loss")
    return {key: metric[key] for key in [*(k for k in first if k in metric), *metric]}


def evaluate_now(run: Run) -> None:
    """Evaluate, tell, and save `best` if it is; nothing if a signal comes.  Collective."""
    if run.eval_loader is None:
        return
    metrics = evaluate(
        run.model, run.eval_loader, run.loss_inputs, is_stopped=lambda: bool(run.stop_signal())
    )
    if metrics is None:
        run.progress.say(f"step {run.done}/{run.steps}: evaluation was broken off")
        return
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


def finish(run: Run) -> int:
    """Evaluate what was trained unless that is done; return a signal that came, else 0."""
    evaluations = run.history.evaluations
    if not evaluations or evaluations[-1]["step"] != run.done:
        evaluate_now(run)
    return run.stop_signal()


def complete(run: Run) -> None:
    """Save `last`, draw the plot, push to the hub.  Collective."""
    path = save_last(run)
    keep_newest(run)
    report = run.config.report
    if run.ranks.is_first:
        run.progress.say(f"done after {run.done} steps: {path}")
        if report.push_to_hub is not None:
            run.progress.say(f"pushed to {push(run.folder.root / LAST, report)}")
    run.ranks.wait()


def end_early(run: Run, signal: int) -> None:
    """Save, and leave what there is to see, after a signal.  Collective."""
    path = save_last(run)
    run.progress.say(f"stopped by signal {signal}; {path} is saved")


def save_last(run: Run) -> str:
    """Save `last`, tell steps that were not told yet, draw the plot.  Collective."""
    path = save(run, LAST)
    told = run.history.training
    if run.done and (not told or told[-1]["step"] != run.done):
        tell(run)
    if run.ranks.is_first and run.history.lines:
        plot(run.history, run.folder.plot, title=f"{run.config.recipe}: {run.config.model.id}")
    return path


def without_step(line: Line) -> Line:
    """Return a line as trackers take it: the step is an argument of its own."""
    return {key: value for key, value in line.items() if key != "step"}
