"""What ranks do for the tests of families."""

from typing import Any

import torch

from tests.multiprocess.data import Batch
from tests.multiprocess.tasks import base_logps, error_of, make_model


def loading_error(folder: Any) -> tuple[list[str], str] | None:
    """Return the error of loading a checkpoint, or None."""
    return error_of(lambda: make_model(folder, {}))


def logps_or_error(folder: Any, batch: Batch) -> Any:
    """Return log-probabilities, or the error that kept the model from loading, as a tuple."""
    result: Any = None

    def run() -> None:
        nonlocal result
        result = base_logps(folder, batch)

    return error_of(run) or result


def trained_adapter(folder: Any, lora: dict[str, Any], batch: Batch, output_dir: str) -> Any:
    """Take one step with an adapter; return where it was saved, log-probabilities and losses.

    Or the error that kept it from being made, as a tuple.
    """
    result: dict[str, Any] = {}

    def run() -> None:
        model = make_model(folder, lora)
        model.set_optimizer("AdamW", lr=1e-2)
        result["loss"] = model.forward_backward(inputs=batch).loss
        model.clip_grad_and_step(max_grad_norm=1.0)
        result["logps"] = model.forward_only(inputs=batch).logps
        result["saved"] = model.save("adapter", output_dir=output_dir)

    return error_of(run) or result


def written_by_bridge(folder: Any) -> dict[str, torch.Tensor]:
    """Return the checkpoint as the mappings of this project's bridges write it back.

    Only tensors of mappings that the project defines.  Collective over TP.
    """
    from megatrain_bridges.concatenated import ConcatenatedGatedMLPMapping  # in ranks only

    network: Any = make_model(folder, {})._network
    registry = network.table._bridge.mapping_registry()
    registry.set_process_groups_from_pg_collection(network.groups.collection)
    result: dict[str, torch.Tensor] = {}
    for parameter in network.table.parameters:
        mapping = registry.megatron_to_hf_lookup(parameter.global_name)
        if isinstance(mapping, ConcatenatedGatedMLPMapping):
            result |= mapping.megatron_to_hf(parameter.parameter, parameter.module)
    return result
