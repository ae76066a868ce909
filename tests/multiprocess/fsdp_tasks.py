"""What ranks do for test_fsdp."""

import functools
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

import megatrain
from tests.multiprocess.data import Batch
from tests.multiprocess.memory_tasks import Peak
from tests.multiprocess.tasks import error_of, make_model, reduced_gradient


def local(parameter: torch.Tensor) -> torch.Tensor:
    """Return what this rank keeps of a parameter."""
    from megatrain.model import fsdp

    return fsdp.local(parameter)


def train_by_halves(
    folder: Any, batches: Sequence[Batch], options: dict[str, Any], output_dir: str
) -> dict[str, Any]:
    """Train all parameters, each batch in two calls of several micro-batches each."""
    model = make_model(folder, {}, max_tokens_per_microbatch=64, **options)
    report: dict[str, Any] = {"before": model.forward_only(inputs=batches[0]).logps}
    model.set_optimizer("AdamW", lr=1e-4)
    report["losses"], report["norms"] = [], []
    for batch in batches:
        halves = [model.forward_backward(inputs=half) for half in (batch[:2], batch[2:])]
        model.forward_only(inputs=batch[:1])  # parameters are gathered without a backward
        tokens = [half.num_tokens for half in halves]
        losses = [half.loss * n for half, n in zip(halves, tokens, strict=True)]
        report["losses"].append(sum(losses) / sum(tokens))
        report["norms"].append(model.clip_grad_and_step())
    report["logps"] = model.forward_only(inputs=batches[0]).logps
    report["tensors"] = model.get_state_dict()
    report["saved"] = model.save("whole", output_dir=output_dir)
    return report


def train_adapter(
    folder: Any, batches: Sequence[Batch], options: dict[str, Any], output_dir: str
) -> dict[str, Any]:
    """Train an adapter on all linears, each batch in several micro-batches."""
    model = make_model(folder, max_tokens_per_microbatch=64, **options)
    model.set_optimizer("AdamW", lr=1e-4)
    report: dict[str, Any] = {"losses": [], "norms": []}
    model.forward_backward(inputs=batches[0])
    report["gradient"] = reduced_gradient(model)
    model.zero_grad()
    for batch in batches:
        report["losses"].append(model.forward_backward(inputs=batch).loss)
        report["norms"].append(model.clip_grad_and_step())
    report["logps"] = model.forward_only(inputs=batches[0]).logps
    report["adapter"] = model.get_state_dict()
    report["saved"] = model.save("adapter", output_dir=output_dir)
    return report


def kept_entries(folder: Any, batch: Batch, lora: dict[str, Any]) -> dict[str, Any]:
    """Return how many entries a rank keeps between steps: of the base, in memory, in optimizer."""
    model = make_model(folder, lora)
    model.set_optimizer("AdamW", lr=1e-4)
    model.forward_backward(inputs=batch)
    model.clip_grad_and_step()
    model.forward_only(inputs=batch)
    parameters = [p.parameter for p in model._network.table.parameters]
    trained = model._trainer.trained[next(iter(model._trainer.trained))]
    return {
        "whole": sum(p.numel() for p in parameters),
        "local": sum(local(p).numel() for p in parameters),
        "gathered": sum(_bytes_of_gathered(chunk) for chunk in model._network.chunks),
        "sums": sum(shard.grad_P.numel() for shard in trained.gradients.shards),
        "masters": sum(shard.master_Q.numel() for shard in trained.gradients.shards),
        "moments": sum(
            value.numel()
            for state in trained.optimizer.state.values()
            for name, value in state.items()
            if name == "exp_avg"
        ),
    }


def _bytes_of_gathered(chunk: torch.nn.Module) -> int:
    """Return the memory that the parameters' whole values, once gathered, still have."""
    units = [unit for unit in chunk.modules() if isinstance(unit, FSDPModule)]
    groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    gathered = [each.unsharded_param for group in groups for each in group.fsdp_params]
    return sum(value.untyped_storage().nbytes() for value in gathered)


def flat_buffers(folder: Any, batch: Batch) -> dict[str, Any]:
    """Return by name what masters are as flat buffers, and what the parameters are, after a step.

    And whether this rank's part of the buffers is, bit for bit, what they were gathered from.
    """
    from megatrain.model.base import base_slices
    from megatrain.model.fsdp import whole

    model = make_model(folder, {})
    model.set_optimizer("AdamW", lr=1e-2)
    model.forward_backward(inputs=batch)
    model.clip_grad_and_step()
    network, trained = model._network, model._trainer.trained[""]
    same, equal = [], []
    for shard in trained.gradients.shards:
        flat = shard.gather_flat(shard.master_Q)
        same.append(torch.equal(shard.shard_of(flat), shard.master_Q))
        for each, view in zip(shard.trained, shard.views(flat), strict=True):
            equal.append(torch.equal(view, whole(each.parameter, network.groups)))
    names = {piece.name for piece in base_slices(network.table)}
    covered = {n for shard in trained.gradients.shards for t in shard.trained for n in t.names}
    return {"same": all(same), "equal": all(equal), "covered": names == covered}


def bf16_norms(folder: Any, batch: Batch) -> tuple[list[float], list[float]]:
    """Return two steps' gradient norms, and the same after a pass with all parameters frozen."""
    result = []
    for warm in (False, True):
        model = megatrain.MegatronModel(str(folder), mixed_precision="bf16")
        if warm:
            model.forward_only(inputs=batch)
        model.set_optimizer("AdamW", lr=1e-3)
        norms = []
        for _ in range(2):
            model.forward_backward(inputs=batch)
            norms.append(model.clip_grad_and_step())
        result.append(norms)
    return result[0], result[1]


def steps_around_an_error(folder: Any, batches: Sequence[Batch]) -> list[list[float]]:
    """Return gradient norms of two steps, without and with backward failing between them."""
    result = []
    for fails in (False, True):
        model = make_model(folder, {})
        model.set_optimizer("AdamW", lr=1e-2)
        norms = []
        for batch in batches:
            if fails and norms:
                layer = model._network.chunks[0].decoder.layers[1]
                handle = layer.mlp.register_full_backward_hook(_fail)
                assert error_of(functools.partial(model.forward_backward, inputs=batches[0]))
                handle.remove()
                model.zero_grad()
            model.forward_backward(inputs=batch)
            norms.append(model.clip_grad_and_step())
        result.append(norms)
    return result


def _fail(*args: object) -> None:
    raise RuntimeError("a backward that fails")


def save_and_go_on(folder: Any, batches: Sequence[Batch], output_dir: str) -> dict[str, Any]:
    """Train all parameters on the first batch, save, and train on the others."""
    model = make_model(folder, {})
    model.set_optimizer("AdamW", lr=1e-4)
    _steps(model, batches[:1])
    path = model.save("half", output_dir, save_optimizer=True, consumed_train_samples=6)
    return _steps(model, batches[1:]) | {"path": path}


def resume(folder: Any, path: str, batches: Sequence[Batch]) -> dict[str, Any]:
    """Train on from a saved state."""
    model = make_model(folder, {})
    place = model.resume_from_checkpoint(path)
    return _steps(model, batches) | {"place": place}


def _steps(model: Any, batches: Sequence[Batch]) -> dict[str, Any]:
    losses = []
    for batch in batches:
        losses.append(model.forward_backward(inputs=batch).loss)
        model.clip_grad_and_step()
    return {"losses": losses, "tensors": model.get_state_dict()}


def loading_growth(folder: Path) -> dict[str, int]:
    """Return bytes: growth while loading, what the rank keeps, and its largest unit when whole."""
    gc.collect()
    with Peak() as peak:
        model = make_model(folder, {})
    (chunk,) = model._network.chunks
    units = [*chunk.decoder.layers, chunk.embedding, chunk.output_layer]
    size = lambda p: p.numel() * p.element_size()  # noqa: E731
    return {
        "growth": peak.largest - peak.before,
        "kept": sum(size(local(p)) for p in chunk.parameters()),
        "whole": sum(size(p) for p in chunk.parameters()),
        "unit": max(sum(size(p) for p in unit.parameters()) for unit in units),
    }
