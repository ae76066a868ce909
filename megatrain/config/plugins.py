"""Losses, rewards, templates and the like by name: built in, registered, installed, or a file's."""

import functools
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args

from megatrain.config.loss_names import LOSSES
from megatrain.config.names import nearest
from megatrain.config.plugin_code import attribute, download, load_file, member
from megatrain.errors import ConfigError

Kind = Literal[
    "loss",
    "metric",
    "reward",
    "advantage",
    "preprocessor",
    "filter",
    "template",
    "processor",
    "patch",
]

BASES: Mapping[str, str] = {
    "loss": "megatrain.train.loss:Loss",
    "metric": "megatrain.rl.metric:Metric",
    "reward": "megatrain.rl.reward:Reward",
    "advantage": "megatrain.rl.advantage:Advantage",
    "preprocessor": "megatrain.data.preprocessors.base:Preprocessor",
    "filter": "megatrain.data.filters:Filter",
    "template": "megatrain.data.template.base:Template",
    "processor": "megatrain.data.input_processor:InputProcessor",
    "patch": "megatrain.model.patch:Patch",
}
"""Base class of each kind, imported when something of that kind is asked for."""

NOT_FUNCTIONS = ("template", "patch")
"""Kinds with more than one method: a plain function cannot stand for them."""

_PREPROCESSORS = "megatrain.data.preprocessors"

BUILT_IN: Mapping[str, Mapping[str, str]] = {
    "loss": LOSSES,
    "metric": {
        "CompletionRewardMetric": "megatrain.rl.metrics.completion:CompletionRewardMetric",
        "GradNormMetric": "megatrain.rl.metrics.training:GradNormMetric",
        "LossMetric": "megatrain.rl.metrics.training:LossMetric",
        "ThroughputMetric": "megatrain.rl.metrics.speed:ThroughputMetric",
        "TokenAccuracyMetric": "megatrain.rl.metrics.training:TokenAccuracyMetric",
    },
    "reward": {
        "AccuracyReward": "megatrain.rl.rewards.accuracy:AccuracyReward",
        "CountdownReward": "megatrain.rl.rewards.countdown:CountdownReward",
        "FormatReward": "megatrain.rl.rewards.format:FormatReward",
        "GSM8KAccuracyReward": "megatrain.rl.rewards.accuracy:GSM8KAccuracyReward",
        "GSM8KFormatReward": "megatrain.rl.rewards.accuracy:GSM8KFormatReward",
    },
    "advantage": {
        "GAEAdvantage": "megatrain.rl.advantages.gae:GAEAdvantage",
        "GRPOAdvantage": "megatrain.rl.advantages.group:GRPOAdvantage",
        "RLOOAdvantage": "megatrain.rl.advantages.group:RLOOAdvantage",
        "ReinforcePlusPlusAdvantage": (
            "megatrain.rl.advantages.reinforce:ReinforcePlusPlusAdvantage"
        ),
    },
    "preprocessor": {
        "MessagesProcessor": f"{_PREPROCESSORS}.messages:MessagesProcessor",
        "AlpacaProcessor": f"{_PREPROCESSORS}.alpaca:AlpacaProcessor",
        "SelfCognitionProcessor": f"{_PREPROCESSORS}.self_cognition:SelfCognitionProcessor",
        "GSM8KProcessor": f"{_PREPROCESSORS}.gsm8k:GSM8KProcessor",
        "CountdownProcessor": f"{_PREPROCESSORS}.countdown:CountdownProcessor",
        "PreferenceProcessor": f"{_PREPROCESSORS}.preference:PreferenceProcessor",
        "TextProcessor": f"{_PREPROCESSORS}.text:TextProcessor",
    },
    "filter": {
        "LengthFilter": "megatrain.data.filters:LengthFilter",
        "EmptyFilter": "megatrain.data.filters:EmptyFilter",
    },
    "template": {"Template": "megatrain.data.template.base:Template"},
    "processor": {"InputProcessor": "megatrain.data.input_processor:InputProcessor"},
    "patch": {},
}
"""By kind: name -> "module:Name", imported when it is asked for."""

_registered: dict[str, dict[str, Any]] = {kind: {} for kind in get_args(Kind)}


def register[T](kind: Kind, name: str) -> Callable[[T], T]:
    """Return a decorator that makes a class or function known as `name` in this process."""
    _check_kind(kind)

    def add(target: T) -> T:
        _check_target(kind, target, name)
        if name in BUILT_IN[kind]:
            raise ConfigError(f"{name!r} is a built-in {kind}", hint="choose another name")
        _registered[kind][name] = target
        return target

    return add


def known_names(kind: Kind) -> list[str]:
    """Return the names of `kind` that resolve() knows: built in, registered, installed."""
    _check_kind(kind)
    installed = {entry.name for entry in entry_points(group=f"megatrain.{kind}")}
    return sorted({*BUILT_IN[kind], *_registered[kind], *installed})


def resolve(kind: Kind, spec: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the class, callable or instance of `kind` that `spec` says.

    `spec` is one of
    - a name: built in, registered, or an entry point of the group "megatrain.<kind>";
    - "package.module:Name";
    - "folder/file.py:Name", or "hf://owner/repository[/file.py]:Name" (ms:// for ModelScope; the
      file is "<kind>.py" unless given): these run code that no one installed, and need
      `trust_remote_code`;
    - the thing itself.
    A class must be a subclass of the kind's base class.  Raises ConfigError otherwise.
    """
    _check_kind(kind)
    target = _find(kind, spec, trust_remote_code) if isinstance(spec, str) else spec
    _check_target(kind, target, spec)
    return target


def build(
    kind: Kind, spec: Any, options: Mapping[str, Any], *, trust_remote_code: bool = False
) -> Any:
    """Resolve `spec` and give it its options: an instance of a class, or a bound function.

    An option that it does not take is a ConfigError that names the nearest one; so is one that it
    needs and does not get.
    """
    target = resolve(kind, spec, trust_remote_code=trust_remote_code)
    what = f"{kind} {_label(spec)}"
    check_options(target, options, what=what)
    if not inspect.isclass(target):
        return functools.partial(target, **options) if options else target
    return target(**options)


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_options(target: Any, options: Mapping[str, Any], *, what: str) -> None:
    """Raise ConfigError unless `target` takes each of `options` by name and needs no other one.

    What a function needs beside its options comes with each call, so only a class needs options.
    """
    if not inspect.isclass(target) and not options:
        return
    if not inspect.isclass(target) and not inspect.isfunction(target):
        raise ConfigError(f"{what} is built already, and takes no options {sorted(options)}")
    parameters = inspect.signature(target).parameters.values()
    by_name = [parameter for parameter in parameters if parameter.kind in _BY_NAME]
    names = [parameter.name for parameter in by_name]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    for option in () if takes_any else options:
        if option not in names:
            raise ConfigError(
                f"{what} has no option {option!r}; it has {', '.join(names) or 'none'}",
                hint=nearest(option, names),
            )
    for parameter in by_name if inspect.isclass(target) else ():
        if parameter.default is inspect.Parameter.empty and parameter.name not in options:
            raise ConfigError(f"{what} needs the option {parameter.name!r}")


def _check_kind(kind: str) -> None:
    if kind not in BASES:
        raise ConfigError(f"unknown kind of plug-in {kind!r}; known: {', '.join(BASES)}")


def _check_target(kind: str, target: Any, spec: Any) -> None:
    base = attribute(BASES[kind])
    if isinstance(target, base) or (inspect.isclass(target) and issubclass(target, base)):
        return
    if inspect.isclass(target) or kind in NOT_FUNCTIONS or not callable(target):
        allowed = "" if kind in NOT_FUNCTIONS else ", or a function"
        raise ConfigError(
            f"{kind} {_label(spec)} must be a subclass of {base.__module__}.{base.__name__}"
            f"{allowed}, not {target!r}"
        )


def _label(spec: Any) -> str:
    return spec if isinstance(spec, str) else getattr(spec, "__qualname__", repr(spec))


def _find(kind: Kind, spec: str, trusted: bool) -> Any:
    if spec in _registered[kind]:
        return _registered[kind][spec]
    if spec in BUILT_IN[kind]:
        return attribute(BUILT_IN[kind][spec])
    place, _, name = spec.rpartition(":")
    if not place or name.startswith("//"):
        return _installed(kind, spec)
    if "://" in place or place.endswith(".py"):
        _require_trust(kind, spec, trusted)
        path = download(place, f"{kind}.py") if "://" in place else Path(place).expanduser()
        return member(load_file(path), name)
    return attribute(spec)


def _installed(kind: Kind, spec: str) -> Any:
    for entry in entry_points(group=f"megatrain.{kind}", name=spec):
        return entry.load()
    names = known_names(kind)
    raise ConfigError(
        f"unknown {kind} {spec!r}; known: {', '.join(names) or 'none'}",
        hint=nearest(spec, names) or 'give "package.module:Name" for one of your own',
    )


def _require_trust(kind: Kind, spec: str, trusted: bool) -> None:
    if not trusted:
        raise ConfigError(
            f"{kind} {spec!r} would run a file's code",
            hint="read the file, then pass trust_remote_code=True",
        )
