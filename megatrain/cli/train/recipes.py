"""What each recipe stands for: how rows are read, which loss, which head."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatrain.config.run import RunConfig
from megatrain.errors import ConfigError
from megatrain.train.loss import Loss
from megatrain.train.losses import make_loss


@dataclass(frozen=True, slots=True)
class Recipe:
    """Defaults of one recipe."""

    preprocessor: str
    """Turns a source's columns into standard rows unless the configuration names another."""
    loss: str
    """Unless the configuration names another."""
    task: str = "causal_lm"
    """`reward`: a score head instead of log-probabilities."""
    unit: int = 1
    """Data that a row becomes: 2 for a pair."""


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "pt": Recipe("TextProcessor", "CrossEntropyLoss"),
        "sft": Recipe("MessagesProcessor", "CrossEntropyLoss"),
        "dpo": Recipe("PreferenceProcessor", "DPOLoss", unit=2),
        "kto": Recipe("PreferenceProcessor", "KTOLoss"),
        "rm": Recipe("PreferenceProcessor", "RewardModelLoss", task="reward", unit=2),
        "distill": Recipe("megatrain.cli.train.teacher:TeacherProcessor", "DistillationLoss"),
    }
)


def loss_of(config: RunConfig) -> Loss:
    """Return the run's loss.

    Raises ConfigError for an unknown name or option, or a loss that does not go with the recipe.
    """
    recipe, section = RECIPES[config.recipe], config.loss
    loss = make_loss(
        section.name or recipe.loss,
        section.options,
        trust_remote_code=config.data.trust_remote_code,
    )
    name = type(loss).__name__
    if loss.uses_scores != (recipe.task == "reward"):
        raise ConfigError(
            f"{name} {'needs' if loss.uses_scores else 'does not take'} scores: "
            f"recipe={config.recipe!r}",
            hint='recipe = "rm" has a score head, the others have log-probabilities',
        )
    if loss.unit != recipe.unit:
        raise ConfigError(
            f"{name} takes {loss.unit} data a row, and {config.recipe} has {recipe.unit}",
            hint="dpo and rm have pairs; the other recipes single rows",
        )
    _check_reference(config, loss)
    return loss


def _check_reference(config: RunConfig, loss: Loss) -> None:
    if "kl" in loss.inputs and config.train.batch_size < 2:
        raise ConfigError(
            "KTO compares answers with those of other rows: train.batch_size must be at least 2"
        )
    if "ref_logps" in loss.inputs and config.full and config.data.streaming:
        raise ConfigError(
            "with full = true the reference is computed for all rows before the first step: "
            "data.streaming must be false"
        )
