"""What ranks do for the comparison of layers.  Megatron is imported on the ranks only."""

import json
from pathlib import Path


def trace(checkpoint, folder, data, adapter=None):
    """Write what this rank sees of a model, perhaps with a PEFT adapter on it."""
    from megatrain.api.session import current_session
    from megatrain.bus import engine
    from megatrain.config.model import ModelConfig
    from megatrain.export.compare.peft_values import fill
    from megatrain.export.compare.trace_megatron import trace_network
    from megatrain.export.peft_adapter import read_adapter

    config = ModelConfig(mixed_precision="no")
    trainer = engine.open_model(str(checkpoint), config, current_session())
    name = ""
    if adapter is not None:
        name = "default"
        hf_config = json.loads((Path(checkpoint) / "config.json").read_text())
        spec, tensors = read_adapter(adapter, hf_config=hf_config)
        engine.add_adapter(trainer, name, spec, seed=0, accumulation_steps=1)
        fill(trainer.network.adapters[name], tensors)
    trace_network(trainer.network, data, folder, adapter=name)
