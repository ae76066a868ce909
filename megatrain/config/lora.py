"""What LoRA adapts, and how strongly: the part of PEFT's LoraConfig that megatrain supports.

Matching follows PEFT to the letter (`check_target_module_exists`, `get_pattern_key`).  No torch, no
PEFT.  Names are Hugging Face's; an expert is `...mlp.experts.3.gate_proj`, and
`...mlp.experts.gate_proj` stands for every expert of that layer.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from megatrain.config.peft_fields import supported
from megatrain.errors import ConfigError

_EXPERT = re.compile(r"\.experts\.\d+\.(?=[^.]+$)")
_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """One adapter's options, in PEFT's words.  Raises ConfigError when they cannot work."""

    r: int = 8
    """Rank where rank_pattern says nothing."""
    lora_alpha: float = 8
    """Alpha where alpha_pattern says nothing; the factor is alpha / r, or alpha / sqrt(r)."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of A while training."""
    target_modules: tuple[str, ...] | str | None = None
    """Names or endings of names; or one regular expression of whole names; or `all-linear`."""
    exclude_modules: tuple[str, ...] | str | None = None
    """What target_modules must not take: names or endings, or one regular expression."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Rank by regular expression of a name's end; the first that matches counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Alpha by regular expression of a name's end; the first that matches counts."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    init_lora_weights: bool | str = True
    """True: A is Kaiming-uniform and B zero; gaussian: A normal / r; False: both random."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules to train in full.  Not supported: must stay empty."""
    layers_to_transform: tuple[int, ...] | int | None = None
    """Indices of the layers to adapt; not for a regular expression."""
    layers_pattern: tuple[str, ...] | str | None = None
    """Name of the list of layers, where the first number in a name is not the layer."""
    target_parameters: tuple[str, ...] | None = None
    """Names or endings of parameters: `mlp.experts.gate_up_proj`, `mlp.gate.weight`."""
    bias: str = "none"
    """Only `none`."""

    def __post_init__(self) -> None:
        """Turn lists and sets into tuples, and check."""
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        if isinstance(self.target_parameters, str):
            raise ConfigError(
                f"target_parameters must be a list of names: {self.target_parameters!r}",
                hint="put it in a list",
            )
        parameters = _names("target_parameters", self.target_parameters)
        object.__setattr__(self, "target_parameters", parameters)
        layers = self.layers_to_transform
        if layers is not None and not isinstance(layers, int):
            object.__setattr__(self, "layers_to_transform", tuple(layers) or None)
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        self._check_numbers()
        self._check_choices()
        self._check_targets()

    def _check_numbers(self) -> None:
        ranks = {"r": self.r} | {f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(
                    f"{name} must be a whole number of at least 1: {rank!r}",
                    hint="leave a module out with exclude_modules rather than by rank 0",
                )
        alphas = {"lora_alpha": self.lora_alpha}
        alphas |= {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if not number or not 0 < alpha < math.inf:
                raise ConfigError(f"{name} must be a positive number: {alpha!r}", hint="PEFT: 8")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"lora_dropout must be at least 0 and below 1: {self.lora_dropout!r}",
                hint="0.0 turns it off",
            )

    def _check_choices(self) -> None:
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"init_lora_weights is not supported: {self.init_lora_weights!r}",
                hint="True, False or 'gaussian'",
            )
        if self.modules_to_save:
            raise ConfigError(
                f"modules_to_save is not supported: {list(self.modules_to_save)}",
                hint="adapt embed_tokens and lm_head with target_modules",
            )
        if self.bias != "none":
            raise ConfigError(f"bias is not supported: {self.bias!r}", hint="bias='none'")

    def _check_targets(self) -> None:
        if not self.target_modules and not self.target_parameters:
            raise ConfigError(
                "an adapter needs targets: target_modules and target_parameters are empty",
                hint="target_modules='all-linear', or a list of names such as ['q_proj', 'v_proj']",
            )
        if isinstance(self.target_modules, str) and (
            self.layers_to_transform is not None or self.layers_pattern
        ):
            raise ConfigError(
                "layers_to_transform and layers_pattern need a list in target_modules: "
                f"{self.target_modules!r}",
                hint="put the layers into the regular expression",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern needs layers_to_transform: layers_pattern={self.layers_pattern!r}",
                hint="say which layers",
            )
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        patterns += [
            text
            for text in (self.target_modules, self.exclude_modules)
            if isinstance(text, str) and text.lower() != "all-linear"
        ]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"not a regular expression: {pattern!r}: {error}") from error

    @classmethod
    def from_any(cls, config: Any) -> Self:
        """Take a LoraSpec, a dict or a `peft.LoraConfig`.

        Raises:
            ConfigError: a field is unknown, or set to what megatrain does not support.
        """
        if isinstance(config, cls):
            return config
        if not isinstance(config, Mapping):
            if not hasattr(config, "to_dict"):
                raise ConfigError(
                    f"not a LoRA configuration: {type(config).__name__}",
                    hint="pass peft.LoraConfig, LoraSpec or a dict",
                )
            config = config.to_dict()

        return cls(**supported(config, known={each.name for each in dataclasses.fields(cls)}))

    @property
    def is_all_linear(self) -> bool:
        """Whether the model, not a name, decides: every linear layer except the output one."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def matches(self, name: str) -> bool:
        """Return whether this adapter adapts the module `name`.

        A parameter named by target_parameters counts for the module (`mlp.gate`) or expert
        (`mlp.experts.3.down_proj`) that it is.

        Raises:
            ConfigError: `all-linear`, which only the model can decide.
        """
        if self.pattern_name(name) != name:
            return True
        if self.is_all_linear:
            raise ConfigError(
                "target_modules='all-linear' is decided by the model, not by a name",
                hint="list the linear layers, and test excludes(name)",
            )
        if self.excludes(name) or self.target_modules is None:
            return False
        return any(self._targets(each) for each in {name, without_expert(name)})

    def excludes(self, name: str) -> bool:
        """Return whether exclude_modules names this module."""
        excluded, names = self.exclude_modules, {name, without_expert(name)}
        if isinstance(excluded, str):
            return any(re.fullmatch(excluded, each) for each in names)
        return any(_ends(each, excluded or ()) for each in names)

    def _targets(self, name: str) -> bool:
        targets = self.target_modules
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        if targets is None:
            return False
        return name in targets or (_ends(name, targets) and self.chooses_layer_of(name))

    def chooses_layer_of(self, name: str) -> bool:
        """Return whether layers_to_transform, if it is set, names the layer of this module."""
        layers = self.layers_to_transform
        if layers is None:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else None
        patterns = patterns or list(self.layers_pattern or ())
        expressions = [rf"(?:^|.*?\.){each}\.(?P<index>\d+)\." for each in patterns]
        for expression in expressions or [_LAYER.pattern]:
            if found := re.match(expression, name):
                index = int(found["index"])
                return index == layers if isinstance(layers, int) else index in layers
        return False

    def targets_parameter(self, name: str) -> bool:
        """Return whether target_parameters names this parameter (`...mlp.gate.weight`)."""
        return _ends(name, self.target_parameters or ())

    def pattern_name(self, name: str) -> str:
        """Return the name by which PEFT knows a module: its parameter's, if that is targeted."""
        for parameter in (f"{name}.weight", without_expert(name)):
            if self.targets_parameter(parameter):
                return parameter
        return name

    def rank_of(self, name: str) -> int:
        """Return the rank of the module `name`."""
        return look_up(self.rank_pattern, self.pattern_name(name), self.r)

    def alpha_of(self, name: str) -> float:
        """Return the alpha of the module `name`."""
        return look_up(self.alpha_pattern, self.pattern_name(name), self.lora_alpha)

    def scale_of(self, name: str) -> float:
        """Return the factor of B A for the module `name`."""
        return self.scale(rank=self.rank_of(name), alpha=self.alpha_of(name))

    def scale(self, *, rank: int, alpha: float) -> float:
        """Return alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def to_peft_dict(
        self, *, target_modules: Iterable[str], target_parameters: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Return adapter_config.json for exactly these targets.

        Dropout is left out where parameters are targeted, since PEFT refuses it there.
        """
        parameters = sorted(target_parameters)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": 0.0 if parameters else self.lora_dropout,
            "target_modules": sorted(target_modules),
            "target_parameters": parameters or None,
            "exclude_modules": None,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "use_rslora": self.use_rslora,
            "init_lora_weights": self.init_lora_weights,
            "modules_to_save": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "bias": "none",
            "fan_in_fan_out": False,
        }


def without_expert(name: str) -> str:
    """Return `...experts.gate_proj` for `...experts.3.gate_proj`; other names as they are."""
    return _EXPERT.sub(".experts.", name)


def look_up[T](patterns: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first pattern that matches the end of `name`, as PEFT does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _names(option: str, value: Any) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    if wrong := [each for each in names if not isinstance(each, str)]:
        raise ConfigError(f"{option} must hold names: {wrong}", hint="a list of strings")
    return names


def _ends(name: str, endings: Iterable[str]) -> bool:
    return any(name == each or name.endswith(f".{each}") for each in endings)
