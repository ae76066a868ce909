"""What Transformers and PEFT compute, in the test process, which nothing has patched."""

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.multiprocess.data import Batch, num_labels

torch.set_num_threads(1)


@functools.cache
def _loaded(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_model(folder: Path) -> nn.Module:
    """Return the checkpoint as Transformers loads it in float32; a copy of the caller's own."""
    return copy.deepcopy(_loaded(folder))


def peft_model(folder: Path, adapter: str | Path) -> nn.Module:
    """Return the checkpoint with a saved adapter; a key that PEFT does not take is an error."""
    with warnings.catch_warnings():
        # PEFT looks for the keys of rank_pattern among modules only, and then uses them for
        # target_parameters all the same.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        model = PeftModel.from_pretrained(hf_model(folder), str(adapter))
        loaded = model.load_adapter(str(adapter), "default")
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
    return model.eval()


def logps_of(model: nn.Module, datum: dict[str, Any]) -> Tensor:
    """Return log p(labels[t] | input_ids[:t]), 0 at t = 0 and where there is no label."""
    ids, labels = torch.tensor([datum["input_ids"]]), torch.tensor(datum["labels"])
    logps = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    chosen = logps[:-1].gather(1, labels[1:, None].clamp(min=0))[:, 0]
    return torch.cat([torch.zeros(1), chosen * (labels[1:] != -100)])


@torch.no_grad()
def all_logps(model: nn.Module, batch: Batch) -> list[np.ndarray]:
    """Return logps_of for every datum, each run alone."""
    return [logps_of(model, datum).numpy() for datum in batch]


def train(model: nn.Module, parameters: list[nn.Parameter], batches: list[Batch]) -> list[float]:
    """Take an AdamW step at lr 1e-4, clipped to 1, for each batch; return the losses before."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-4), []
    for batch in batches:
        loss = -sum(logps_of(model, datum).sum() for datum in batch) / num_labels(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def largest_difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Return the largest absolute difference between two lists of arrays of equal shapes."""
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def largest_adapter_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest absolute difference between two adapters with the same names."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest |ours - theirs| of a tensor over the largest |theirs| in that tensor."""
    assert ours.keys() == theirs.keys()
    result = 0.0
    for name, want in theirs.items():
        scale = float(want.abs().max())
        error = float((ours[name] - want).abs().max())
        result = max(result, error / scale if scale else float(error > 0))
    return result
