"""What ranks do for test_start_from."""

from pathlib import Path
from typing import Any

from tests.multiprocess.data import Batch
from tests.multiprocess.tasks import error_of, make_model


def load(folder: Path, adapter: Path, batch: Batch) -> dict[str, Any]:
    """Return log-probabilities after loading, and after training and loading once more."""
    model = make_model(folder, {})
    model.load(adapter)
    model.set_optimizer("AdamW", lr=1e-2)
    new = model.forward_only(inputs=batch).logps
    model.forward_backward(inputs=batch)
    norm = model.clip_grad_and_step()
    model.load(str(adapter), adapter_name="default")
    return {"new": new, "norm": norm, "again": model.forward_only(inputs=batch).logps}


def load_error(folder: Path, adapter: Path) -> Any:
    """Return the error of loading."""
    model = make_model(folder, {})
    return error_of(lambda: model.load(adapter))
