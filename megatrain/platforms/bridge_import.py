"""Import Megatron-Core, then Megatron-Bridge, so that it works without Transformer Engine."""

import contextlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterator

import torch

NAMES = ("transformer_engine", "transformer_engine.pytorch")


class _Missing(torch.nn.Module):
    """Stands where a class of Transformer Engine is named and never used."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("Transformer Engine is not installed")


class _StandIn(types.ModuleType):
    """Answers any class name with _Missing; any other name with a stand-in of its own."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value: object = _Missing if name[0].isupper() else _StandIn(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


@contextlib.contextmanager
def _transformer_engine_stand_in() -> Iterator[None]:
    """Let `import transformer_engine` succeed inside, and leave no trace in sys.modules.

    megatron.bridge.peft.lora_layers imports Transformer Engine at module level, although nothing
    that we use from Bridge needs it (megatron-bridge 0.6.2).  PEFT looks for the module's spec
    and fails on a stand-in, so it must be gone afterwards.
    """
    if importlib.util.find_spec("transformer_engine") is not None:
        yield
        return
    package = _StandIn(NAMES[0])
    package.__path__ = []
    package.__version__ = "0.0.0"  # type: ignore[attr-defined]
    package.pytorch = _StandIn(NAMES[1])  # type: ignore[attr-defined]
    sys.modules.update({NAMES[0]: package, NAMES[1]: package.pytorch})
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == NAMES[0]]:
            del sys.modules[name]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Megatron from telling what is not installed or deprecated; `megatrain doctor` does.

    Errors are still logged.  Megatron-Bridge sets its own log level when it is imported.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        for name in ("megatron.core", "megatron.bridge"):
            logging.getLogger(name).setLevel(logging.ERROR)


def import_megatron() -> None:
    """Import megatron.core, then megatron.bridge.  Takes seconds the first time.

    Megatron-Core must see that Transformer Engine is absent before the stand-in is there.
    """
    with quiet():
        import megatron.core.models.gpt.gpt_layer_specs  # noqa: PLC0415

        with _transformer_engine_stand_in():
            import megatron.bridge  # noqa: F401, PLC0415
