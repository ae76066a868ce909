"""What ranks do for test_vllm: train an adapter, and export it for vLLM as a user does."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from tests.multiprocess.data import Batch
from tests.multiprocess.tasks import make_model


def trained_for_vllm(folder: Any, lora: dict[str, Any], batch: Batch, out: Path) -> Any:
    """Take one step with an adapter and export it to `out`/adapter.

    Return log-probabilities with and without it, and the options that the export names for vLLM;
    what the command said if it failed.
    """
    import megatrain
    from megatrain.cli import main

    model = make_model(folder, lora)
    model.set_optimizer("AdamW", lr=1e-2)
    base = model.forward_only(inputs=batch, adapter_name="").logps
    model.forward_backward(inputs=batch)
    model.clip_grad_and_step(max_grad_norm=1.0)
    adapter = model.forward_only(inputs=batch).logps
    state = model.save("state", str(out), consumed_train_samples=0)
    megatrain.shutdown()
    command = ["convert", "adapter", "export", state, str(out / "adapter"), "--for", "vllm"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main([*command, "--verify", "--report", str(out / "report.json")])
    if status:
        return said.getvalue()
    options = json.loads((out / "report.json").read_text())["result"]["vllm_options"]
    return {"base": base, "adapter": adapter, "options": options}
