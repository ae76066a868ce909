"""What can be checked of a run before a row is read: names and options of all that it uses."""

from megatrain.cli.train import rows
from megatrain.cli.train.model import complete_schedule, patches_of, processor_of
from megatrain.config.names import nearest
from megatrain.config.run import RunConfig
from megatrain.errors import ConfigError
from megatrain.train.loss import Loss

MANY_STEPS = 1_000_000
"""Stands for the length of a run where it follows from the number of rows."""

TOKEN_ACCURACY = "token_accuracy"
"""What is reported of every loss on log-probabilities."""


def check_run(config: RunConfig, loss: Loss) -> None:
    """Raise ConfigError for what cannot work, with the nearest name there is.

    Megatron must have been made ready: by `initialize`, or `prepare`.
    """
    from megatrain.train.optimizer import check_optimizer  # imports Megatron

    check_metric(config, loss)
    check_optimizer(config.optimizer.name, config.optimizer.options)
    complete_schedule(config, config.train.max_steps or MANY_STEPS)
    processor_of(config)
    patches_of(config)
    rows.check_steps(config)


def check_metric(config: RunConfig, loss: Loss) -> None:
    """Raise ConfigError for a best_metric that no evaluation reports."""
    asked = config.train.best_metric
    known = {"loss", *loss.statistics}
    if not loss.uses_scores:
        known.add(TOKEN_ACCURACY)
    if asked not in known:
        raise ConfigError(
            f"train.best_metric must be a metric of the evaluation: {asked!r}; "
            f"{type(loss).__name__} has {', '.join(sorted(known))}",
            hint=nearest(asked, known),
        )
