"""What ranks do for the tests.  Every function runs on each rank of a mesh."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

import megatrain
from tests.multiprocess.data import Batch

LORA = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False}
"""A and B both random, so that every gradient is something."""


def make_model(
    folder: Any, lora: dict[str, Any] | None = None, accumulate: int = 1, **options: Any
) -> Any:
    """Return a float32 MegatronModel with an adapter (none for an empty `lora`)."""
    model = megatrain.MegatronModel(str(folder), mixed_precision="no", **options)
    lora = LORA if lora is None else lora
    if lora:
        model.add_adapter_to_model("default", lora, gradient_accumulation_steps=accumulate)
    return model


def call(name: str, *args: Any, **options: Any) -> Any:
    """Call `module:function`."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)(*args, **options)


def error_of(function: Callable[[], object]) -> tuple[list[str], str] | None:
    """Return the names of the error's classes and its text, or None if there was none."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 - the test looks at what it is
        return [kind.__name__ for kind in type(error).__mro__], str(error)
    return None


def reduced_gradient(model: Any) -> dict[str, torch.Tensor] | None:
    """Return the whole gradient by factor name on rank 0, as the optimizer would see it."""
    model.clip_grad_norm(0)
    return model.get_gradients()


def layout_report(folder: Any, batches: Sequence[Batch], output_dir: str) -> dict[str, Any]:
    """Return everything that must not depend on the layout."""
    model = make_model(folder)
    report: dict[str, Any] = {"initial": model.get_state_dict()}
    report["base"] = model.forward_only(inputs=batches[0], adapter_name="").logps
    model.set_optimizer("AdamW", lr=1e-4)
    first = model.forward_backward(inputs=batches[0])
    report["gradient"] = reduced_gradient(model)
    model.zero_grad()
    report["after_gradient"] = model.get_state_dict()
    outputs, norms = [first], []
    for batch in batches:
        outputs.append(model.forward_backward(inputs=batch))
        norms.append(model.clip_grad_and_step())
    last = model.forward_only(inputs=batches[0])
    report |= {
        "losses": [output.loss for output in outputs],
        "logps": [output.logps for output in [*outputs, last]],
        "norms": norms,
        "adapter": model.get_state_dict(),
        "saved": model.save("adapter", output_dir=output_dir),
    }
    return report


def base_logps(folder: Any, batch: Batch, options: dict[str, Any] | None = None) -> Any:
    """Return the base model's output for a batch."""
    return make_model(folder, {}, **(options or {})).forward_only(inputs=batch).logps


def three_steps(folder: Any, lora: dict[str, Any], batches: Sequence[Batch]) -> dict[str, Any]:
    """Return an adapter before and after an AdamW step at lr 1e-4 for each batch."""
    model = make_model(folder, lora)
    model.set_optimizer("AdamW", lr=1e-4)
    initial, losses = model.get_state_dict(), []
    for batch in batches:
        losses.append(model.forward_backward(inputs=batch).loss)
        model.clip_grad_and_step(max_grad_norm=1.0)
    return {"initial": initial, "losses": losses, "adapter": model.get_state_dict()}


def logps_alone_and_packed(folder: Any, batch: Batch) -> dict[str, Any]:
    """Return each datum's log-probabilities with an adapter: run alone, and all in one pack."""
    packed = make_model(folder, max_tokens_per_microbatch=100_000)
    return {
        "packed": packed.forward_only(inputs=batch).logps,
        "alone": [packed.forward_only(inputs=[datum]).logps[0] for datum in batch],
        "reversed": packed.forward_only(inputs=batch[::-1]).logps[::-1],
    }


def gradient_of(
    folder: Any, calls: Sequence[Batch], options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the reduced gradient after these calls of forward_backward, and their outputs."""
    model = make_model(folder, **(options or {}))
    outputs = [model.forward_backward(inputs=batch) for batch in calls]
    return {
        "gradient": reduced_gradient(model),
        "losses": [output.loss for output in outputs],
        "tokens": [output.num_tokens for output in outputs],
        "logps": [array for output in outputs for array in output.logps],
    }


def steps_on_every_nth_call(folder: Any, batches: Sequence[Batch], every: int) -> dict[str, Any]:
    """Return what clip_grad_and_step returned, and whether the adapter moved, call by call."""
    model = make_model(folder, accumulate=every)
    model.set_optimizer("AdamW", lr=1e-4)
    model.set_lr_scheduler("LinearWarmupScheduler", num_warmup_steps=1, num_training_steps=10)
    norms, moved, before = [], [], model.get_state_dict()
    for batch in batches:
        model.forward_backward(inputs=batch)
        norms.append(model.clip_grad_and_step())
        after = model.get_state_dict()
        moved.append(any(not torch.equal(after[name], before[name]) for name in before))
        before = after
    metrics = model.calculate_metric()
    return {"norms": norms, "moved": moved, "metrics": metrics, "adapter": before}


def step_singly(folder: Any, batches: Sequence[Batch], max_norm: float) -> dict[str, Any]:
    """Return the adapter after steps taken by clip_grad_norm, step, zero_grad and lr_step."""
    model = make_model(folder)
    model.set_optimizer("AdamW", lr=1e-4)
    norms = []
    for batch in batches:
        model.forward_backward(inputs=batch)
        norms.append(model.clip_grad_norm(max_norm))
        model.step()
        model.zero_grad()
        model.lr_step()
    return {"adapter": model.get_state_dict(), "norms": norms}


def sgd_step(folder: Any, batch: Batch, max_norm: float) -> dict[str, Any]:
    """Return the adapter before and after one plain step at learning rate 1, and the norm."""
    model = make_model(folder)
    model.set_optimizer("SGD", lr=1.0)
    before = model.get_state_dict()
    model.forward_backward(inputs=batch)
    norm = model.clip_grad_and_step(max_grad_norm=max_norm)
    return {"before": before, "after": model.get_state_dict(), "norm": norm}


def learning_rates(folder: Any, batch: Batch, kind: str, options: dict[str, int]) -> list[float]:
    """Return the learning rate before each of five steps."""
    model = make_model(folder)
    model.set_optimizer("AdamW", lr=1e-3)
    model.set_lr_scheduler(kind, **options)
    rates = []
    for _ in range(5):
        model.forward_backward(inputs=batch)
        model.clip_grad_and_step()
        rates.append(model.calculate_metric()["lr"])
    return rates


def dropout_outputs(folder: Any, lora: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """Return log-probabilities while training, and without dropout."""
    model = make_model(folder, lora)
    train = model.forward_backward(inputs=batch).logps
    return {"train": train, "evaluate": model.forward_only(inputs=batch).logps}


def mfu_report(folder: Any, lora: dict[str, Any], batch: Batch) -> Any:
    """Return the metrics of a step and the peak that its mfu is measured against."""
    from megatrain.train.utilisation import peak_flops

    model = make_model(folder, lora)
    model.set_optimizer("AdamW", lr=1e-4)
    model.forward_backward(inputs=batch)
    metrics = model.calculate_metric()
    return metrics, peak_flops(model._network.groups.device, "no")


def outcome(folder: Any, batch: Batch) -> Any:
    """Return the error of a first forward_backward."""
    model = make_model(folder)
    return error_of(lambda: model.forward_backward(inputs=batch))
