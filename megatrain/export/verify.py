"""Compare an adapter with PEFT, in a process of its own that has neither Megatron nor patches.

    python -m megatrain.export.verify FOLDER

FOLDER holds request.json (base_model, adapter or null, dtype) and data.safetensors (per datum i:
`input_ids.i`, `labels.i`); the answer is written to it as logprobs.safetensors (`logprobs.i`).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatrain.errors import ExportError
from megatrain.export.attach import check_load

IGNORED_LABEL = -100
REQUEST, DATA, ANSWER = "request.json", "data.safetensors", "logprobs.safetensors"
_REPOSITORY = Path(__file__).resolve().parents[2]


def compare_with_peft(
    base_model: str | Path,
    adapter: str | Path | None,
    data: Sequence[Mapping[str, Any]],
    expected: Sequence[Any],
    *,
    timeout_s: float,
    dtype: str = "float32",
) -> float:
    """Return the largest difference between `expected` log-probabilities and PEFT's.

    Raises:
        ExportError: PEFT does not take exactly the adapter's weights, or computes no number, or the
            process fails or takes too long.
    """
    actual = logprobs_in_own_process(base_model, adapter, data, timeout_s=timeout_s, dtype=dtype)
    if len(expected) != len(actual):
        raise ExportError(f"one array per datum: {len(expected)} expected, {len(actual)} data")
    largest = 0.0
    for index, (ours, theirs) in enumerate(zip(expected, actual, strict=True)):
        ours = np.asarray(ours, dtype=np.float32)
        if ours.shape != theirs.shape:
            raise ExportError(f"datum {index}: shape {ours.shape} expected, PEFT {theirs.shape}")
        if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
            raise ExportError(f"datum {index}: log-probabilities are not finite")
        if ours.size:
            largest = max(largest, float(np.abs(ours - theirs).max()))
    return largest


def logprobs_in_own_process(
    base_model: str | Path,
    adapter: str | Path | None,
    data: Sequence[Mapping[str, Any]],
    *,
    timeout_s: float,
    dtype: str = "float32",
) -> list[np.ndarray]:
    """Return log-probabilities of the base model (with an adapter, if given), one array per datum.

    `[t]` is log p(labels[t] | input_ids[:t]); 0.0 at t = 0 and where the label is -100.

    Raises:
        ExportError: the process fails or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="megatrain-verify-") as name:
        folder = Path(name)
        request = {
            "base_model": str(base_model),
            "adapter": None if adapter is None else str(Path(adapter).resolve()),
            "dtype": dtype,
        }
        (folder / REQUEST).write_text(json.dumps(request))
        columns = {
            f"{column}.{index}": torch.tensor(np.asarray(datum[column]), dtype=torch.int64)
            for index, datum in enumerate(data)
            for column in ("input_ids", "labels")
        }
        save_file(columns, folder / DATA)
        _run(folder, timeout_s=timeout_s)
        answer = load_file(folder / ANSWER)
        return [answer[f"logprobs.{index}"].numpy() for index in range(len(data))]


def _run(folder: Path, *, timeout_s: float) -> None:
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
    paths = [str(_REPOSITORY), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "megatrain.export.verify", str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"PEFT did not answer within timeout_s={timeout_s}") from error
    if done.returncode:
        raise ExportError(f"PEFT cannot compute this adapter:\n{done.stderr.strip()[-2000:]}")


def load_model(base_model: str, adapter: str | None, *, dtype: torch.dtype) -> nn.Module:
    """Load a Hugging Face model and, if given, an adapter.

    Raises:
        ExportError: a LoRA weight of the file is not used, or one of the model is not in the file.
    """
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=dtype).eval()
    if adapter is None:
        return model
    config = LoraConfig.from_pretrained(adapter)
    config.inference_mode = True
    with_adapter = PeftModel(model, config)
    weights = load_file(Path(adapter) / "adapter_model.safetensors")
    check_load(set_peft_model_state_dict(with_adapter, weights))
    return with_adapter.eval()


@torch.inference_mode()
def label_logprobs(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return log p(labels[t] | input_ids[:t]) in float32; 0.0 at t = 0 and without a label."""
    result = torch.zeros(len(input_ids), dtype=torch.float32)
    kept = (labels != IGNORED_LABEL).nonzero().flatten()
    kept = kept[kept > 0]
    if len(kept):
        logits = model(input_ids=input_ids[None]).logits[0, kept - 1].float()
        chosen = logits.log_softmax(-1).gather(-1, labels[kept, None])
        result[kept] = chosen[:, 0]
    return result


def answer(folder: Path) -> None:
    """Answer the request in a folder."""
    request = json.loads((folder / REQUEST).read_text())
    dtype = getattr(torch, request["dtype"])
    model = load_model(request["base_model"], request["adapter"], dtype=dtype)
    data = load_file(folder / DATA)
    save_file(
        {
            f"logprobs.{index}": label_logprobs(
                model, data[f"input_ids.{index}"], data[f"labels.{index}"]
            )
            for index in range(len(data) // 2)
        },
        folder / ANSWER,
    )


if __name__ == "__main__":
    answer(Path(sys.argv[1]))
