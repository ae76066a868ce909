"""Which parameters share an optimizer's options: Muon or AdamW, LoRA+ rates, weight decay."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatrain.errors import ConfigError
from megatrain.model.tensor_slice import TrainedParameter
from megatrain.parallel.groups import Groups


@dataclass(frozen=True, slots=True)
class GroupKey:
    """What one parameter group has in common."""

    rule: str = "plain"
    """plain; for Muon: muon or adamw."""
    rate: str = "base"
    """base; for LoRA+: B or embedding as well."""
    decays: bool = True


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Options of set_optimizer that tell parameters apart, whatever the optimizer.

    Patterns are regular expressions, searched in Hugging Face's names (a LoRA factor's ends in
    `.lora_A` or `.lora_B`).  Raises ConfigError when they cannot work.
    """

    no_decay: Sequence[str] = ()
    """What weight decay leaves alone.  Empty: nothing, as in torch.  Transformers' Trainer does as
    `[r"bias$", r"norm\\.weight$"]`."""
    loraplus_lr_ratio: float | None = None
    """LoRA+ (Hayou et al., arXiv:2402.12354): the learning rate of B over that of A."""
    loraplus_lr_embedding: float | None = None
    """With LoRA+: the learning rate of an embedding's A and B; None means PEFT's 1e-6."""
    adamw_parameters: Sequence[str] = ()
    """For Muon: what AdamW trains, beside embeddings, head, norms and biases."""

    def __post_init__(self) -> None:
        """Check."""
        for option in ("no_decay", "adamw_parameters"):
            _check_patterns(option, getattr(self, option))
        for option in ("loraplus_lr_ratio", "loraplus_lr_embedding"):
            _check_positive(option, getattr(self, option))
        if self.loraplus_lr_embedding is not None and self.loraplus_lr_ratio is None:
            raise ConfigError(
                f"loraplus_lr_embedding={self.loraplus_lr_embedding} is for LoRA+ alone",
                hint="set loraplus_lr_ratio, 16 for example",
            )

    def keys(self, *, muon: bool) -> list[GroupKey]:
        """Return every key that a parameter may have, in a fixed order."""
        rules = ("muon", "adamw") if muon else ("plain",)
        rates = ("base", "B", "embedding") if self.loraplus_lr_ratio is not None else ("base",)
        decays = (True, False) if self.no_decay else (True,)
        return [GroupKey(*each) for each in itertools.product(rules, rates, decays)]

    def key_of(self, trained: TrainedParameter, *, muon: bool) -> GroupKey:
        """Return a parameter's key; patterns are taken to hold for all of its names, or none."""
        rule = "plain"
        if muon:
            is_matrix = trained.num_dims == 2 and trained.place == "layer"
            rule = "muon" if is_matrix and not _any(self.adamw_parameters, trained) else "adamw"
        rate = "base"
        if self.loraplus_lr_ratio is not None:
            if trained.place == "embedding":
                rate = "embedding"
            elif trained.factor == "B":
                rate = "B"
        return GroupKey(rule, rate, decays=not _any(self.no_decay, trained))

    def overrides(self, key: GroupKey, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of one group, where they differ from the optimizer's."""
        result: dict[str, Any] = {}
        if key.rule != "plain":
            result["use_muon"] = key.rule == "muon"
        if key.rule == "adamw":
            names = ("lr", "betas", "eps", "weight_decay")
            result |= {name: defaults[f"adamw_{name}"] for name in names}
            for name in ("lr", "weight_decay"):
                result[name] = defaults[name] if result[name] is None else result[name]
        lr = result.get("lr", defaults["lr"])
        if key.rate == "B":
            result["lr"] = lr * self.loraplus_lr_ratio
        elif key.rate == "embedding":
            result["lr"] = self.loraplus_lr_embedding or 1e-6
        if not key.decays:
            result["weight_decay"] = 0.0
        return result


def present_keys(
    options: GroupOptions, trained: Sequence[TrainedParameter], groups: Groups, *, muon: bool
) -> list[GroupKey]:
    """Return the keys that parameters of any rank have: the same groups on every layout.

    Raises ConfigError, on every rank, for LoRA+ without LoRA, a pattern that no name matches, or
    one that matches a part of a fused parameter.  Collective over all ranks.
    """
    keys, patterns = options.keys(muon=muon), [*options.no_decay, *options.adamw_parameters]
    here = {options.key_of(each, muon=muon) for each in trained}
    flags = [key in here for key in keys]
    flags += [any(_matches(pattern, t) != "none" for t in trained) for pattern in patterns]
    flags += [any(_matches(pattern, t) == "some" for t in trained) for pattern in patterns]
    flags.append(any(t.factor is None for t in trained))
    everywhere = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, group=groups.control)
    present, matched, mixed, base = everywhere.bool().split(
        [len(keys), len(patterns), len(patterns), 1]
    )
    for pattern, any_match, partly in zip(patterns, matched, mixed, strict=True):
        if not any_match:
            raise ConfigError(f"no trained parameter's name matches {pattern!r}")
        if partly:
            raise ConfigError(
                f"{pattern!r} matches a part of a fused parameter (q, k, v; gate, up) only",
                hint="let it match all of them, or none",
            )
    if bool(base) and options.loraplus_lr_ratio is not None:
        raise ConfigError("loraplus_lr_ratio is for LoRA: the base itself is trained here")
    return [key for key, there in zip(keys, present, strict=True) if there]


def _matches(pattern: str, trained: TrainedParameter) -> str:
    found = {re.search(pattern, name) is not None for name in trained.names}
    return "some" if len(found) > 1 else "all" if found == {True} else "none"


def _any(patterns: Sequence[str], trained: TrainedParameter) -> bool:
    return any(_matches(pattern, trained) != "none" for pattern in patterns)


def _check_patterns(option: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{option} must be a list of regular expressions: {value!r}")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{option}: {pattern!r} is no regular expression: {error}") from error


def _check_positive(option: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise ConfigError(f"{option} must be a positive number: {value!r}")
