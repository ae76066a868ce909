"""What ranks do for the tests of whole models, targets by name and several adapters."""

from collections.abc import Sequence
from typing import Any

from tests.multiprocess.data import Batch
from tests.multiprocess.tasks import error_of, make_model, reduced_gradient


def train_everything(folder: Any, batches: Sequence[Batch], output_dir: str) -> dict[str, Any]:
    """Train all parameters one AdamW step a batch; return results, tensors and what was saved."""
    model = make_model(folder, {})
    model.set_optimizer("AdamW", lr=1e-4)
    losses, norms = [], []
    for batch in batches:
        losses.append(model.forward_backward(inputs=batch).loss)
        norms.append(model.clip_grad_and_step())
    return {
        "losses": losses,
        "norms": norms,
        "logps": model.forward_only(inputs=batches[0]).logps,
        "tensors": model.get_state_dict(),
        "saved": model.save("whole", output_dir=output_dir),
        "config": model.get_train_configs(),
    }


def refuses_adapter_beside_base(folder: Any) -> Any:
    """Return the error of adding an adapter to a model that is trained as a whole."""
    model = make_model(folder, {})
    model.set_optimizer("AdamW", lr=1e-4)
    return error_of(
        lambda: model.add_adapter_to_model("late", {"r": 2, "target_modules": ["q_proj"]})
    )


def optimizer_errors(folder: Any) -> tuple[Any, Any]:
    """Return the error of an optimizer for all parameters, and then of one for an adapter."""
    whole = error_of(lambda: make_model(folder, {}).set_optimizer("AdamW", lr=1e-4))
    model = make_model(folder, {"r": 2, "target_modules": ["q_proj"]})
    return whole, error_of(lambda: model.set_optimizer("AdamW", lr=1e-4))


def train_targets(
    folder: Any, lora: dict[str, Any], batches: Sequence[Batch], output_dir: str
) -> dict[str, Any]:
    """Train an adapter; return its first gradient, its results and what was saved."""
    model = make_model(folder, lora)
    model.set_optimizer("AdamW", lr=1e-4)
    model.forward_backward(inputs=batches[0])
    gradient = reduced_gradient(model)
    model.zero_grad()
    for batch in batches:
        model.forward_backward(inputs=batch)
        model.clip_grad_and_step()
    return {
        "gradient": gradient,
        "adapter": model.get_state_dict(),
        "logps": model.forward_only(inputs=batches[0]).logps,
        "saved": model.save("adapter", output_dir=output_dir),
    }


def two_adapters(folder: Any, batches: Sequence[Batch]) -> dict[str, Any]:
    """Train adapters a and b in turn; return each, and each trained alone."""
    first = {"r": 4, "target_modules": "all-linear"}
    second = {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}
    together = make_model(folder, {})
    for name, lora in (("a", first), ("b", second)):
        together.add_adapter_to_model(name, lora)
        together.set_optimizer("AdamW", lr=1e-3, adapter_name=name)
    for batch in batches:
        for name in ("a", "b"):
            together.forward_backward(inputs=batch, adapter_name=name)
            together.clip_grad_and_step(adapter_name=name)
    result = {name: together.get_state_dict(adapter_name=name) for name in ("a", "b")}
    for name, lora in (("a", first), ("b", second)):
        alone = make_model(folder, lora)
        alone.set_optimizer("AdamW", lr=1e-3)
        for batch in batches:
            alone.forward_backward(inputs=batch)
            alone.clip_grad_and_step()
        result[f"{name}_alone"] = alone.get_state_dict()
    return result


def base_beside_adapter(folder: Any, batch: Batch) -> dict[str, Any]:
    """Return the base's log-probabilities before there was an adapter, and beside a random one."""
    before = make_model(folder, {}).forward_only(inputs=batch).logps
    model = make_model(folder)
    return {
        "before": before,
        "beside": model.forward_only(inputs=batch, adapter_name="").logps,
        "adapted": model.forward_only(inputs=batch).logps,
    }


def bf16_logps(folder: Any, batch: Batch, precision: str) -> Any:
    """Return the base's log-probabilities in half precision."""
    import megatrain

    model = megatrain.MegatronModel(str(folder), mixed_precision=precision)
    return model.forward_only(inputs=batch).logps


def fp16_training(folder: Any) -> Any:
    """Return the error of training in fp16."""
    import megatrain

    model = megatrain.MegatronModel(str(folder), mixed_precision="fp16")
    model.add_adapter_to_model("default", {"r": 2, "target_modules": ["q_proj"]})
    return error_of(lambda: model.set_optimizer("AdamW", lr=1e-4))
