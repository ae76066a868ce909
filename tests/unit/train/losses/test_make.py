"""Losses by name, class, instance and function; the registry; options by their nearest name."""

import dataclasses
import inspect
import re

import pytest

from megatrain.config import plugins
from megatrain.config.loss_names import LOSSES
from megatrain.errors import ConfigError
from megatrain.train import losses
from megatrain.train.loss import Loss
from megatrain.train.losses.function import FunctionLoss
from megatrain.train.losses.grpo import GRPOLoss
from megatrain.train.losses.make import make_loss
from tests.unit.train.losses.batches import make_batch

HERE = "tests.unit.train.losses.test_make"


def scaled(batch, rewards, scale=1.0, *, shift=0.0):
    """A loss of one's own: a per-call input, and options with and without their default."""
    return -(batch.logps_N * (scale * rewards + shift)).sum()


def test_every_public_loss_has_a_name_and_every_name_a_loss():
    classes = {name for name in losses.__all__ if name.endswith("Loss")} - {"FunctionLoss"}
    assert classes == {name for name in LOSSES if name.endswith("Loss")}
    for name, place in LOSSES.items():
        kind = type(make_loss(name))
        assert place.endswith(f":{kind.__name__}")
        assert kind is getattr(losses, kind.__name__)
        assert not name.endswith("Loss") or name == kind.__name__


def test_tinker_s_names_are_there():
    names = {"cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"}
    assert names == {name for name in LOSSES if not name.endswith("Loss")}


@pytest.mark.parametrize("name", [name for name in LOSSES if name.endswith("Loss")])
def test_every_loss_documents_itself_and_takes_only_keywords(name):
    kind = getattr(losses, name)
    assert dataclasses.is_dataclass(kind)
    assert inspect.getdoc(kind)
    parameters = inspect.signature(kind).parameters.values()
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters)


def test_a_class_takes_its_options():
    loss = make_loss(GRPOLoss, {"epsilon": 0.3, "beta": 0.1})
    assert loss == GRPOLoss(epsilon=0.3, beta=0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needy(GRPOLoss):
    """A loss with an option that has no default."""

    weight: float


def test_an_option_without_a_default_is_asked_for():
    for options in ({}, {"beta": 0.1}):
        with pytest.raises(ConfigError, match="loss Needy needs the option 'weight'"):
            make_loss(Needy, options)
    assert make_loss(Needy, {"weight": 2.0}).weight == 2.0


def test_an_instance_is_taken_as_it_is_and_takes_no_options():
    loss = GRPOLoss()
    assert make_loss(loss) is loss
    with pytest.raises(ConfigError, match="is built already"):
        make_loss(loss, {"epsilon": 0.1})


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'epsilon_high'"):
        make_loss(GRPOLoss, {"epsilon_hig": 0.1})


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="unknown loss 'NoSuchLoss'"):
        make_loss("NoSuchLoss")


def test_a_registered_name_is_found(monkeypatch):
    monkeypatch.setitem(plugins._registered, "loss", {})
    plugins.register("loss", "mine")(scaled)
    assert isinstance(make_loss("mine"), FunctionLoss)


def test_what_is_no_loss_is_refused():
    with pytest.raises(ConfigError, match="must be a subclass of"):
        make_loss(dict)
    with pytest.raises(ConfigError, match="must be a subclass of"):
        make_loss(3)


def test_parameters_of_a_function_are_options_or_inputs():
    loss = make_loss(f"{HERE}:scaled", {"shift": 0.5})
    assert isinstance(loss, Loss)
    assert {name: spec.required for name, spec in loss.inputs.items()} == {
        "rewards": True,
        "scale": False,
    }
    batch = make_batch([[-1.0, -2.0], [-3.0]], rewards=[[1.0, 2.0], [3.0]])
    total, statistics = loss(batch)
    assert float(total.detach()) == 1.0 * 1.5 + 2.0 * 2.5 + 3.0 * 3.5
    assert statistics == {}
    assert loss.divisor([2, 1]) == 3


def test_an_optional_input_of_a_function_may_be_given():
    batch = make_batch([[-1.0, -2.0]], rewards=[[1.0, 1.0]], scale=[[2.0, 3.0]])
    assert float(make_loss(scaled)(batch)[0].detach()) == 8.0


def test_an_unknown_option_of_a_function_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        make_loss(scaled, {"scal": 2.0})
    with pytest.raises(ConfigError, match="has no option 'batch'"):
        make_loss(scaled, {"batch": 2.0})


def test_a_function_is_not_called_without_labels():
    def mean(batch):
        return batch.logps_N.sum() / len(batch.logps_N)

    batch = make_batch([])
    total, _ = make_loss(mean)(batch)
    assert float(total.detach()) == 0
    assert total.requires_grad


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda batch: batch.logps_N, r"must return a scalar tensor, not \(2,\)"),
        (lambda batch: 1.0, "must return a scalar tensor, not float"),
        (lambda batch: batch.logps_N.detach().sum(), "without gradient"),
    ],
)
def test_what_a_function_returns_is_checked(function, message):
    with pytest.raises(ConfigError, match=message):
        make_loss(function)(make_batch([[-1.0, -2.0]]))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: None, "must take a LossBatch first"),
        (lambda *, batch: None, "must take a LossBatch first"),
        (lambda batch, **others: None, "must name its parameters"),
        (lambda batch, *others: None, "must name its parameters"),
    ],
)
def test_a_function_that_hides_its_parameters_is_refused(function, message):
    with pytest.raises(ConfigError, match=message):
        make_loss(function)


FUNCTIONS = (
    *("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "grpo", "dpo"),
    *("simpo", "orpo", "kto", "bradley_terry", "mpo", "distillation"),
)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_loss_is_a_function_of_its_own_whose_source_is_named(name):
    function = getattr(losses, name)
    assert inspect.isfunction(function)
    assert re.search(r"Tinker|\d{4}\.\d{4,5}|Schulman et al\.|TRL", inspect.getdoc(function))
    assert name in losses.__all__
