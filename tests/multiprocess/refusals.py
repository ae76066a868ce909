"""What ranks do for test_refusals: make mistakes, and report how they were answered."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import megatrain
from tests.multiprocess.data import Batch
from tests.multiprocess.tasks import LORA, error_of, make_model, reduced_gradient

Answers = dict[str, tuple[list[str], str] | None]


def answers(mistakes: dict[str, Callable[[], object]]) -> Answers:
    return {name: error_of(mistake) for name, mistake in mistakes.items()}


def bad_adapters(folder: Any, configs: dict[str, Any]) -> dict[str, Any]:
    """Return how each LoRA configuration is answered, and which adapters there are after."""
    model = make_model(folder, {})
    result = answers(
        {
            name: lambda config=config: model.add_adapter_to_model("default", config)
            for name, config in configs.items()
        }
    )
    left = [n for c in model._network.chunks for n, _ in c.named_modules() if ".lora" in n]
    return {"answers": result, "adapters": list(model._network.adapters), "modules": left}


def bad_optimizers(folder: Any) -> Answers:
    """Return how unknown optimizers, schedulers and options are answered."""
    model = make_model(folder)
    too_early = error_of(
        lambda: model.set_lr_scheduler("ConstantWarmupScheduler", num_warmup_steps=1)
    )
    set_optimizer, set_scheduler = model.set_optimizer, model.set_lr_scheduler
    result = answers(
        {
            "unknown optimizer": lambda: set_optimizer("Lion"),
            "unknown optimizer option": lambda: set_optimizer("AdamW", learning_rate=1.0),
            "negative learning rate": lambda: set_optimizer("AdamW", lr=-1.0),
        }
    )
    model.set_optimizer("AdamW", lr=1e-4)
    result |= answers(
        {
            "unknown scheduler": lambda: set_scheduler("Step", num_warmup_steps=1),
            "missing scheduler option": lambda: set_scheduler("LinearWarmupScheduler"),
            "unknown scheduler option": lambda: set_scheduler(
                "ConstantWarmupScheduler", num_warmup_steps=1, warmup=2
            ),
        }
    )
    return {"scheduler before optimizer": too_early, **result}


def bad_models(folder: Any, options: dict[str, dict[str, Any]]) -> Answers:
    """Return how each set of MegatronModel options is answered."""
    return answers(
        {
            name: lambda given=given: megatrain.MegatronModel(str(folder), **given)
            for name, given in options.items()
        }
    )


def open_folders(folders: dict[str, Path]) -> Answers:
    """Return how each folder is answered when it is opened as a model."""
    return answers(
        {name: lambda folder=folder: make_model(folder, {}) for name, folder in folders.items()}
    )


def bad_batches(folder: Any, good: Batch, batches: dict[str, Any]) -> dict[str, Any]:
    """Return how batches are answered, and the gradient of `good` with and without them."""
    model = make_model(folder)
    model.forward_backward(inputs=good)
    plain = reduced_gradient(model)
    model.zero_grad()
    model.forward_backward(inputs=good)
    result = answers(
        {
            name: lambda batch=batch: model.forward_backward(inputs=batch)
            for name, batch in batches.items()
        }
    )
    after = reduced_gradient(model)
    return {"answers": result, "plain": plain, "after": after}


def bad_evaluations(folder: Any, batches: dict[str, Any]) -> Answers:
    """Return how forward_only answers batches."""
    model = make_model(folder, {})
    return answers(
        {
            name: lambda batch=batch: model.forward_only(inputs=batch)
            for name, batch in batches.items()
        }
    )


def wrong_order(folder: Any, good: Batch) -> Answers:
    """Return how calls in an order that cannot work are answered."""
    model = make_model(folder, {})
    result = answers(
        {
            "forward_only of no adapter": lambda: model.forward_only(
                inputs=good, adapter_name="default"
            )
        }
    )
    model.add_adapter_to_model("default", LORA)
    result |= answers(
        {
            "a second adapter of the same name": lambda: model.add_adapter_to_model(
                "default", LORA
            ),
            "step without an optimizer": lambda: model.clip_grad_and_step(),
            "norm without gradients": lambda: model.clip_grad_norm(1.0),
            "initialize twice": lambda: megatrain.initialize(mode="local"),
            "an unknown adapter": lambda: model.set_optimizer("AdamW", adapter_name="other"),
        }
    )
    model.set_optimizer("AdamW", lr=1e-4)
    result |= answers({"step without gradients": lambda: model.clip_grad_and_step()})
    model.forward_backward(inputs=good)
    model.clip_grad_norm(1.0)
    result |= answers(
        {"backward after the sum over ranks": lambda: model.forward_backward(inputs=good)}
    )
    model.step()
    model.zero_grad()
    model.forward_backward(inputs=good)
    result |= answers({"everything in order again": lambda: model.clip_grad_and_step()})
    return result


def not_finite(folder: Any, good: Batch) -> dict[str, Any]:
    """Return how losses that are not numbers are answered at step 1, and the state after."""
    model = make_model(folder)
    model.set_optimizer("AdamW", lr=1e-4)
    model.forward_backward(inputs=good)
    model.clip_grad_and_step()
    model.forward_backward(inputs=good)
    tokens = model._trainer.trained["default"].gradients.divisor
    with _poisoned(model):
        train = error_of(lambda: model.forward_backward(inputs=good))
        evaluate = error_of(lambda: model.forward_only(inputs=good))
    kept = model._trainer.trained["default"].gradients.divisor
    after = reduced_gradient(model)
    model.zero_grad()
    model.forward_backward(inputs=good)
    return {
        "train": train,
        "evaluate": evaluate,
        "tokens": (tokens, kept),
        "plain": reduced_gradient(model),
        "after": after,
    }


def not_finite_at_once(folder: Any, good: Batch) -> dict[str, Any]:
    """Return how the first call is answered if its loss is not a number, and a step after it."""
    model = make_model(folder)
    model.set_optimizer("AdamW", lr=1e-4)
    before = model.get_state_dict()
    with _poisoned(model):
        train = error_of(lambda: model.forward_backward(inputs=good))
    step = error_of(lambda: model.clip_grad_and_step())
    return {"train": train, "step": step, "before": before, "after": model.get_state_dict()}


def gradient_overflows(folder: Any, good: Batch) -> dict[str, Any]:
    """Return how an infinite gradient is answered by clip_grad_and_step, and the adapter after."""
    model = make_model(folder)
    model.set_optimizer("AdamW", lr=1e-4)
    before = model.get_state_dict()
    model.forward_backward(inputs=good)
    for shard in model._trainer.trained["default"].gradients.shards:
        shard.grad_P[0] = float("inf")
    error = error_of(lambda: model.clip_grad_and_step())
    after = model.get_state_dict()
    model.forward_backward(inputs=good)
    return {"error": error, "before": before, "after": after, "next": model.clip_grad_and_step()}


@contextlib.contextmanager
def _poisoned(model: Any) -> Any:
    """Make the base's last norm NaN for a while, on the ranks that have one."""
    norms = [
        parameter
        for chunk in model._network.chunks
        for name, parameter in chunk.named_parameters()
        if "final_layernorm" in name
    ]
    saved = [norm.detach().clone() for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.fill_(float("nan"))
    yield
    with torch.no_grad():
        for norm, old in zip(norms, saved, strict=True):
            norm.copy_(old)
