"""The model with its adapters: loaded by name through PEFT, least recently used ones leave."""

import contextlib
import json
import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModelForCausalLM

from megatrain.errors import ConfigError

logger = logging.getLogger(__name__)

BASE = "__base__"
"""PEFT's name, in a mixed batch, for no adapter."""


class Adapters:
    """Adapters of one model.

    The model itself is called; this says which adapters its layers apply.
    """

    def __init__(self, model: Any, max_adapters: int) -> None:
        self.model, self._max = model, max_adapters
        self._peft: Any = None
        self._folders: dict[str, Path] = {}
        self._loaded: OrderedDict[str, str] = OrderedDict()
        """PEFT's names, which have no dots, least recently used first."""
        self._unmixed: set[str] = set()
        self._number = 0
        self._now: tuple[str | None, ...] | None = None
        self._hooks = contextlib.ExitStack()

    @property
    def mixes(self) -> bool:
        """Whether rows of different adapters can go through the model together."""
        return not self._unmixed

    @property
    def loaded(self) -> list[str]:
        """Names of adapters that are in memory."""
        return list(self._loaded)

    def knows(self, name: str) -> bool:
        """Whether an adapter can be used."""
        return name in self._folders

    def add(self, name: str, folder: Path, in_use: Collection[str | None]) -> None:
        """Make an adapter known, and load it.  Raises ConfigError."""
        if name in self._folders:
            raise ConfigError(f"an adapter is called {name!r} already")
        self._folders[name] = folder
        try:
            self.require(name, in_use)
        except BaseException:
            del self._folders[name]
            raise

    def remove(self, name: str) -> None:
        """Forget an adapter; an unknown one is forgotten already."""
        self._folders.pop(name, None)
        self._evict(name)

    def require(self, name: str, in_use: Collection[str | None]) -> None:
        """Have an adapter in memory; others that are not in use may leave.  Raises ConfigError."""
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return
        for other in list(self._loaded):
            if len(self._loaded) < self._max:
                break
            if other not in in_use:
                self._evict(other)
        self._load(name)

    def use(self, names: Sequence[str | None]) -> None:
        """Let the model's layers apply these adapters, one a row."""
        distinct = set(names)
        wanted = tuple(names) if len(distinct) > 1 else tuple(distinct)
        if self._peft is None or wanted == self._now:
            return
        self._leave()
        if wanted == (None,):
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            if len(distinct) == 1:
                self._peft.base_model.set_adapter(self._loaded[str(wanted[0])])
            else:
                internal = [BASE if name is None else self._loaded[name] for name in names]
                # Hooks stay while the rows do: PEFT's own forward would set them in each step.
                hooks = self._peft.base_model._enable_peft_forward_hooks(adapter_names=internal)
                self._hooks.enter_context(hooks)
        self._now = wanted

    def _leave(self) -> None:
        self._hooks.close()
        self._now = None

    def _evict(self, name: str) -> None:
        internal = self._loaded.pop(name, None)
        if internal is not None:
            self._leave()
            self._unmixed.discard(name)
            self._peft.delete_adapter(internal)

    def _load(self, name: str) -> None:
        self._leave()
        folder, internal = self._folders[name], f"v{self._number}"
        self._number += 1
        try:
            config = PeftConfig.from_pretrained(str(folder))
            if not isinstance(config, LoraConfig):
                raise ConfigError(f"only LoRA adapters can be sampled from: {config.peft_type}")
            if self._peft is None:
                config.inference_mode = True
                self._peft = PeftModelForCausalLM(self.model, config, internal)
            found = self._peft.load_adapter(str(folder), internal, is_trainable=False)
            _check(found, name)
        except (
            OSError,
            ValueError,
            KeyError,
            RuntimeError,
            TypeError,
            NotImplementedError,
        ) as error:
            self._drop(internal)
            raise ConfigError(
                f"PEFT cannot load adapter {name!r} onto {type(self.model).__name__}: {error}",
                hint="look at its adapter_config.json, or sample with vLLM",
            ) from error
        self._loaded[name] = internal
        if _is_unmixed(self._peft.peft_config[internal]):
            self._unmixed.add(name)

    def _drop(self, internal: str) -> None:
        if self._peft is not None and internal in self._peft.peft_config:
            self._peft.delete_adapter(internal)


def _check(found: Any, name: str) -> None:
    """Refuse an adapter of which PEFT would leave out a part.  Raises ConfigError."""
    for what in ("missing", "unexpected"):
        keys = getattr(found, f"{what}_keys")
        if keys:
            some = json.dumps(keys[:3])
            raise ConfigError(f"adapter {name!r} has {len(keys)} {what} tensors: {some}")


def _is_unmixed(config: Any) -> bool:
    """Whether PEFT cannot apply this kind of adapter to some rows of a batch only."""
    return bool(
        config.use_dora
        or getattr(config, "target_parameters", None)
        or getattr(config, "trainable_token_indices", None)
        or config.modules_to_save
    )
