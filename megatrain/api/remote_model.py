"""A model whose ranks are other processes: commands are made fit to travel, and sent.  No torch."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from megatrain.bus.codec import Failure, RawTensor
from megatrain.bus.commands import (
    ApplyPatch,
    CloseModel,
    Command,
    Forward,
    ForwardBackward,
    ForwardBackwardMany,
    ForwardMany,
    GetState,
    OpenModel,
    SetLoss,
    SetOptimizer,
    SetSchedule,
)
from megatrain.bus.driver import Driver
from megatrain.bus.failures import error_of
from megatrain.errors import ConfigError
from megatrain.types import LazyRow

_ALWAYS = ("input_ids", "labels", "attention_mask", "position_ids", "lengths")
_SIZES = ("length", "num_labels")


class RemoteModel:
    """Sends a model's commands to a driver's ranks."""

    def __init__(self, command: OpenModel, driver: Driver) -> None:
        self.key = driver.model_key()
        self.trained: list[str] = []
        self._driver = driver
        self.call(replace(command, model=self.key))
        close = CloseModel(model=self.key)
        self._finalizer = weakref.finalize(self, driver.submit_soon, close)
        self._finalizer.atexit = False

    def call(self, command: Command) -> Any:
        """Send a command, wait for it and return its result."""
        return self.submit(command, None).result()

    def submit(
        self,
        command: Command,
        timeout_s: float | None,
        finish: Callable[[Any], Any] = lambda value: value,
    ) -> "Future[Any]":
        """Send a command.  Raises ConfigError for what cannot travel, DataError for a bad batch."""
        if isinstance(command, CloseModel):
            self._finalizer.detach()
        command = portable(command)

        def receive(value: Any, trained: list[str]) -> Any:
            self.trained = trained
            return finish(_received(command, value))

        return self._driver.submit(command, deadline_s=timeout_s, finish=receive)


def _received(command: Command, value: Any) -> Any:
    """Return a command's result as it would be here."""
    if isinstance(command, GetState) and value is not None:
        return tensors_of(value)
    if isinstance(command, ForwardBackwardMany | ForwardMany):
        return {
            name: error_of(each) if isinstance(each, Failure) else each
            for name, each in value.items()
        }
    return value


def portable(command: Command) -> Command:
    """Return a command that can travel: classes by name, inputs as arrays.

    Raises ConfigError for what has no name that another process could import.
    """
    match command:
        case ForwardBackward() | Forward():
            inputs = command.inputs if command.prepare is None else command.prepare(command.inputs)
            return replace(command, inputs=_data(inputs), prepare=None)
        case ForwardBackwardMany() | ForwardMany():
            batches = [replace(each, inputs=_data(each.inputs)) for each in command.batches]
            return replace(command, batches=batches)
        case SetLoss() | ApplyPatch():
            options = _plain(command.options)
            return replace(command, spec=importable(command.spec), options=options)
        case SetOptimizer() | SetSchedule() | OpenModel():
            return replace(command, options=_plain(command.options))
        case _:
            return command


def importable(spec: Any) -> Any:
    """Return a class or function as `module:qualname`; a text as it is.  Raises ConfigError."""
    if isinstance(spec, str):
        return spec
    if getattr(spec, "__self__", None) is not None and not isinstance(spec.__self__, type):
        raise ConfigError(
            f"{spec!r} is a method of an object, and the ranks are other processes",
            hint="give a function, or a class, of a module",
        )
    module, name = getattr(spec, "__module__", None), getattr(spec, "__qualname__", None)
    if module is None or name is None:
        raise ConfigError(
            f"{spec!r} is an object, and the ranks are other processes",
            hint="give its class, or a name, and options",
        )
    if "<" in name or module == "__main__":
        raise ConfigError(
            f"the ranks are other processes, which cannot import {name} of {module}",
            hint="define it at the top level of a module; a lambda or closure has no name there",
        )
    return f"{module}:{name}"


def _plain(value: Any) -> Any:
    """Return options as numbers, texts, lists and dicts, where arrays and the like say the same."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "tolist") and not isinstance(value, type):
        return _plain(value.tolist())
    return value


def _data(inputs: Any) -> Any:
    if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
        return [_datum(item) for item in inputs]
    return inputs


def _datum(item: Any) -> Any:
    """Return a datum with its numbers as arrays; of an encoded row, what a loss may take."""
    if not isinstance(item, Mapping):
        return item
    keys = list(item)
    if isinstance(item, LazyRow):
        keys = [key for key in item if key in (*_ALWAYS, *_SIZES) or key in item.numbers]
    elif all(key in item for key in _SIZES):
        keys = [key for key in item if key in (*_ALWAYS, *_SIZES) or _is_numeric(item[key])]
    return {key: _array(item[key]) for key in keys}


def _is_numeric(value: Any) -> bool:
    return isinstance(_array(value), np.ndarray | int | float)


def _array(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return value  # ragged, or no numbers: the ranks say what is wrong with it
    return array if array.dtype.kind in "biuf" else value


def tensors_of(raw: Mapping[str, RawTensor]) -> dict[str, Any]:
    """Return torch tensors of what a rank sent."""
    import torch  # noqa: PLC0415 - only who asks for tensors needs it

    result = {}
    for name, each in raw.items():
        flat = torch.frombuffer(bytearray(each.data), dtype=torch.uint8)
        result[name] = flat.view(getattr(torch, each.dtype)).reshape(each.shape)
    return result
