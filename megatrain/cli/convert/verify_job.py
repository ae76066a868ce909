"""What each rank of `megatrain convert verify --with megatrain` runs, started by torchrun.

    python -m megatrain.cli.convert.verify_job FOLDER

FOLDER holds request.json and data.safetensors; log-probabilities or traces are written to it.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import megatrain
from megatrain.cli.quickstart.child import report_failure
from megatrain.config.model import ModelConfig
from megatrain.export.verify import ANSWER, DATA, REQUEST
from megatrain.parallel.layout import DeviceMesh

if TYPE_CHECKING:
    from megatrain.train.step import Trainer

PRECISION = {"float32": "no", "bfloat16": "bf16"}
BASE, ADAPTER = "", "default"


def answer(folder: Path) -> None:
    """Compute what the request asks for.  Collective over the request's mesh."""
    request = json.loads((folder / REQUEST).read_text())
    megatrain.initialize(mode="local", global_device_mesh=DeviceMesh(**request["mesh"]), seed=0)
    # Megatron can be imported only now that the platform is prepared.
    from megatrain.api.session import current_session
    from megatrain.bus import engine
    from megatrain.export.compare.trace_megatron import trace_network

    model = Path(request["base_model"])
    config = ModelConfig.model_validate({"mixed_precision": PRECISION[request["dtype"]]})
    trainer = engine.open_model(str(model), config, current_session())
    name = BASE if request["adapter"] is None else ADAPTER
    if name == ADAPTER:
        _add(trainer, Path(request["adapter"]), model)
    if request["layers"]:
        trace_network(trainer.network, _data(folder), folder, adapter=name)
    else:
        logps = trainer.forward_only(name, _data(folder)).logps
        if trainer.network.groups.rank == 0:
            arrays = [torch.tensor(np.asarray(each)) for each in logps]
            save_file({f"logprobs.{i}": each for i, each in enumerate(arrays)}, folder / ANSWER)
    megatrain.shutdown()


def _add(trainer: "Trainer", adapter: Path, model: Path) -> None:
    """Put a PEFT adapter on the model."""
    from megatrain.bus import engine
    from megatrain.export.compare.peft_values import fill
    from megatrain.export.peft_adapter import read_adapter

    config = json.loads((model / "config.json").read_text())
    spec, tensors = read_adapter(adapter, hf_config=config)
    engine.add_adapter(trainer, ADAPTER, spec, seed=0, accumulation_steps=1)
    fill(trainer.network.adapters[ADAPTER], tensors)


def _data(folder: Path) -> list[Any]:
    tensors = load_file(folder / DATA)
    columns = ("input_ids", "labels")
    return [
        {column: tensors[f"{column}.{i}"].numpy() for column in columns}
        for i in range(len(tensors) // len(columns))
    ]


if __name__ == "__main__":
    with report_failure(Path(sys.argv[1]), name=f"rank {os.environ['RANK']}"):
        answer(Path(sys.argv[1]))
