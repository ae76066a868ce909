"""What ranks do for test_adapter_conversion: start from an imported adapter, step, save."""

from typing import Any

from tests.multiprocess.data import Batch
from tests.multiprocess.tasks import error_of, make_model


def start_step_save(folder: Any, state: Any, batch: Batch, output_dir: Any) -> dict[str, Any]:
    """Return log-probabilities and factors before and after one SGD step; save with a state."""
    model = make_model(folder, {})
    place = model.resume_from_checkpoint(state)
    model.set_optimizer("SGD", lr=1.0)
    before = model.get_state_dict()
    untouched = model.save("untouched", output_dir, consumed_train_samples=0)
    output = model.forward_backward(inputs=batch)
    model.clip_grad_and_step(max_grad_norm=0.1)
    return {
        "place": place,
        "logps": output.logps,
        "logps after": model.forward_only(inputs=batch).logps,
        "before": before,
        "after": model.get_state_dict(),
        "untouched": untouched,
        "saved": model.save("saved", output_dir, consumed_train_samples=0),
    }


def start_in_bf16(folder: Any, lora: dict[str, Any], batch: Batch, output_dir: Any) -> str:
    """Return the path of an adapter trained for a step in bf16, with its state."""
    import megatrain

    model = megatrain.MegatronModel(str(folder), mixed_precision="bf16")
    model.add_adapter_to_model("default", lora)
    model.set_optimizer("AdamW", lr=1e-3)
    model.forward_backward(inputs=batch)
    model.clip_grad_and_step()
    return model.save("bf16", output_dir, save_optimizer=True)


def refusal(folder: Any, state: Any) -> Any:
    """Return the error of starting from a state."""
    model = make_model(folder, {})
    return error_of(lambda: model.resume_from_checkpoint(state))
