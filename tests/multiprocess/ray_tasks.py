"""A script for ranks in any mode: the same steps, as one of them or as their driver."""

from collections.abc import Callable, Sequence
from typing import Any

from tests.multiprocess.data import Batch
from tests.multiprocess.tasks import make_model


def train(
    folder: Any,
    batches: Sequence[Batch],
    in_second: Callable[[], object] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return what came of a step for each batch; `in_second` is called while the second is due."""
    model = make_model(folder, **options)
    model.set_optimizer("AdamW", lr=1e-3)
    report: dict[str, Any] = {"losses": [], "logps": [], "norms": []}
    for number, batch in enumerate(batches):
        future = model.forward_backward_async(inputs=batch)
        if number == 1 and in_second is not None:
            in_second()
        output = future.result()
        report["losses"].append(output.loss)
        report["logps"] += output.logps
        report["norms"].append(model.clip_grad_and_step())
    report["adapter"] = model.get_state_dict()
    model.close()
    return report
