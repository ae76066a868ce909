"""What each rank runs: `python -m megatrain.cli.train.job config.json`, or called by the command.

Everything is built in the order in which it can fail cheaply: loss, names and options, rows, then
weights.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import megatrain
from megatrain.cli.quickstart.child import report_failure
from megatrain.cli.train import rows
from megatrain.cli.train.check import check_run
from megatrain.cli.train.folder import RunFolder
from megatrain.cli.train.history import History
from megatrain.cli.train.loop import train
from megatrain.cli.train.mesh import mesh_of
from megatrain.cli.train.model import build_model, reference_name
from megatrain.cli.train.progress import Progress
from megatrain.cli.train.ranks import Ranks, started_rank, started_ranks
from megatrain.cli.train.recipes import loss_of
from megatrain.cli.train.reference import LossInputs
from megatrain.cli.train.resume import resume
from megatrain.cli.train.run import Run
from megatrain.cli.train.trackers import TRACKERS, Tracker, flatten
from megatrain.config.run import RunConfig, parse
from megatrain.data.loader import DataLoader
from megatrain.errors import MegatrainError


def run_job(config: RunConfig) -> int:
    """Run this rank's part of a run; return 0, or 128 + signal.  Collective."""
    loss_of(config)
    megatrain.initialize(
        mode="local",
        global_device_mesh=mesh_of(config, started_ranks()),
        seed=config.train.seed,
        platform=config.platform,
        timeout_s=config.timeout_s,
    )
    status = run_joined(config)
    megatrain.shutdown()
    return status


def run_joined(config: RunConfig) -> int:
    """Do what `run_job` does, on ranks that have joined.  Collective."""
    loss, ranks = loss_of(config), Ranks()
    check_run(config, loss)
    rows.say_progress(shows=ranks.is_first)
    with ranks.first_of_node_first():
        held_out, training = rows.evaluation_rows(config), rows.training_rows(config)
    loader = rows.training_loader(config, training, ranks.mesh)
    steps = count_steps(config, loader)
    model = build_model(config, loss, steps=steps)
    reference = reference_name(config, loss)
    inputs = LossInputs(model, loss, max_length=config.data.max_length, reference=reference)
    eval_loader = None if held_out is None else rows.evaluation_loader(config, held_out)
    if config.full:
        _prepare_reference(inputs, config, training, eval_loader)
    run = _assemble(config, ranks, model, loader, eval_loader, inputs, steps)
    try:
        return train(run)
    finally:
        run.progress.close()
        for tracker in run.trackers:
            tracker.close()


def count_steps(config: RunConfig, loader: DataLoader) -> int:
    """Return the optimizer steps of the whole run; the last may reach into one more epoch."""
    section = config.train
    if section.max_steps is not None:
        return section.max_steps
    return -(-len(loader) * section.epochs // section.gradient_accumulation_steps)


def _prepare_reference(
    inputs: LossInputs, config: RunConfig, training: object, eval_loader: DataLoader | None
) -> None:
    """Compute the reference of every row, with a loader of its own: the run's must not move."""
    once = rows.evaluation_loader(config, training)  # type: ignore[arg-type]
    inputs.prepare([once] if eval_loader is None else [once, eval_loader])


def _assemble(
    config: RunConfig,
    ranks: Ranks,
    model: object,
    loader: DataLoader,
    eval_loader: DataLoader | None,
    inputs: LossInputs,
    steps: int,
) -> Run:
    folder = RunFolder(Path(config.output_dir))
    history = History(
        folder.metrics,
        best_metric=config.train.best_metric,
        greater_is_better=config.train.greater_is_better,
        writes=ranks.is_first,
    )
    done = resume(config, folder, ranks, model, loader, history)
    return Run(
        config=config,
        folder=folder,
        ranks=ranks,
        model=model,
        loader=loader,
        eval_loader=eval_loader,
        loss_inputs=inputs,
        history=history,
        progress=Progress(steps, first=done, shows=ranks.is_first),
        trackers=_trackers(config, folder) if ranks.is_first else (),
        steps=steps,
        done=done,
    )


def _trackers(config: RunConfig, folder: RunFolder) -> Sequence[Tracker]:
    report = config.report
    options = flatten(config.model_dump(mode="json", exclude_none=True))
    name = report.run_name or folder.root.resolve().name
    return [
        TRACKERS[each](project=report.project, run_name=name, folder=folder.root, config=options)
        for each in report.trackers
    ]


def main() -> None:
    """Run one rank that the command started; it tells what failed."""
    file = Path(sys.argv[1])
    config = parse(json.loads(file.read_text()), source=str(file))
    try:
        with report_failure(file.parent / "logs", name=f"rank {started_rank()}"):
            status = run_job(config)
    except MegatrainError:
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
