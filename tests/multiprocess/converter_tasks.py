"""What ranks do for test_converters: fakes of two packages' public interfaces, and their use.

A fake makes a real Megatron model and fills it from the checkpoint, so what a converter returns is
trained on; it notes what it was asked for.
"""

import sys
import types
from pathlib import Path
from typing import Any

from tests.multiprocess.data import Batch
from tests.multiprocess.tasks import error_of

asked: dict[str, Any] = {}


def _whole_model(folder: Path) -> list[Any]:
    """Return chunks of the session's layout, with weights: the default converter's."""
    from megatrain.api.session import current_session
    from megatrain.config.model import ModelConfig
    from megatrain.model.network import build_network

    network = build_network(folder, ModelConfig(mixed_precision="no"), current_session().groups)
    return network.chunks


def _mcore_bridge() -> dict[str, types.ModuleType]:
    """Names as in https://github.com/modelscope/mcore-bridge, version 1.6.5."""
    module: Any = types.ModuleType("mcore_bridge")

    class Config:
        def __init__(self, **options: Any) -> None:
            asked.update(options)
            self.bridge = self
            self.folder = options["hf_config"].name_or_path

        def load_weights(self, models: list[Any], folder: str) -> None:
            asked["loaded"] = (len(models), folder)

    module.ModelConfig = Config
    module.hf_to_mcore_config = lambda config: {"hf_config": config}
    module.get_mcore_model = lambda config: _whole_model(Path(config.folder))
    return {"mcore_bridge": module}


def _mcore_adapter() -> dict[str, types.ModuleType]:
    """Names as in https://github.com/alibaba/ROLL, in its folder mcore_adapter."""
    package: Any = types.ModuleType("mcore_adapter")
    models: Any = types.ModuleType("mcore_adapter.models")

    class TrainingArguments:
        def __init__(self, **options: Any) -> None:
            asked.update(options)

    class AutoModel:
        @staticmethod
        def from_pretrained(folder: str, args: Any) -> Any:
            assert isinstance(args, TrainingArguments)
            return types.SimpleNamespace(get_models=lambda: _whole_model(Path(folder)))

    package.TrainingArguments, package.models, models.AutoModel = (
        TrainingArguments,
        models,
        AutoModel,
    )
    return {"mcore_adapter": package, "mcore_adapter.models": models}


FAKES = {"mcore-bridge": _mcore_bridge, "mcore-adapter": _mcore_adapter}


def train_with(bridge: str, folder: Path, batch: Batch, lora: dict[str, Any]) -> Any:
    """Return log-probabilities, a step's gradient norm and what the fake was asked for."""
    import megatrain

    modules = FAKES[bridge]() if bridge in FAKES else {}
    asked.clear()
    sys.modules.update(modules)
    try:
        model = megatrain.MegatronModel(str(folder), mixed_precision="no", bridge=bridge)
    finally:
        for name in modules:
            del sys.modules[name]
    model.add_adapter_to_model("default", lora)
    model.set_optimizer("AdamW", lr=1e-3)
    logps = model.forward_only(inputs=batch).logps
    model.forward_backward(inputs=batch)
    sizes = {key: value for key, value in asked.items() if key.endswith("parallel_size")}
    return logps, model.clip_grad_and_step(), sizes


def missing(bridge: str, folder: Path) -> Any:
    """Return the error of a converter that is not installed."""
    import megatrain

    return error_of(
        lambda: megatrain.MegatronModel(str(folder), mixed_precision="no", bridge=bridge)
    )


def impostor(folder: Path) -> Any:
    """Return the error of a package that has the converter's module, and nothing of its own."""
    modules = {"mcore_bridge": types.ModuleType("mcore_bridge")}
    sys.modules.update(modules)
    try:
        return missing("mcore-bridge", folder)
    finally:
        del sys.modules["mcore_bridge"]
