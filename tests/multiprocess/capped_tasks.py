"""What ranks do for the tests of capped logits."""

from typing import Any

from tests.multiprocess.data import Batch
from tests.multiprocess.tasks import error_of, make_model, reduced_gradient


def one_step(folder: Any, lora: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """Return the base's results, and an adapter's: its first gradient, and all of an AdamW step."""
    model = make_model(folder, lora)
    model.set_optimizer("AdamW", lr=1e-4)
    initial = model.get_state_dict()
    base = model.forward_only(inputs=batch, adapter_name="").logps
    model.forward_backward(inputs=batch)
    gradient = reduced_gradient(model)
    model.zero_grad()
    output = model.forward_backward(inputs=batch)
    model.clip_grad_and_step(max_grad_norm=1.0)
    return {
        "base": base,
        "initial": initial,
        "gradient": gradient,
        "loss": output.loss,
        "logps": output.logps,
        "adapter": model.get_state_dict(),
    }


def error_of_another_converter(folder: Any) -> Any:
    """Return the error of loading with a converter whose configuration has no cap."""
    return error_of(lambda: make_model(folder, {}, bridge="mcore-bridge"))
