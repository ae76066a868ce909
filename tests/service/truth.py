"""What Transformers and PEFT make of the same data: in this process, which knows no Megatron."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
MUON = partial(torch.optim.Muon, momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


@dataclass(frozen=True)
class Step:
    """Log-probabilities of the targets of all data, one after the other, around one step."""

    before: np.ndarray
    after: np.ndarray
    loss: float
    norm: float


class Truth:
    """One base checkpoint in float32."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def step(
        self,
        adapter: Path | None,
        data: list,
        *,
        lr: float,
        clip: float,
        make: Callable[..., torch.optim.Optimizer] = ADAMW,
    ) -> Step:
        """Return what one step of an optimizer on the sum of weighted cross-entropies does.

        Without an adapter, all parameters are trained.
        """
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32)
        model: torch.nn.Module = base
        if adapter is not None:
            model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = make(trained, lr=lr)
        before, loss = self._pass(model, data)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip or math.inf)
        optimizer.step()
        with torch.no_grad():
            after, _ = self._pass(model, data)
        return Step(before, after, float(loss.detach()), float(norm))

    def _pass(self, model: torch.nn.Module, data: list) -> tuple[np.ndarray, torch.Tensor]:
        logps, total = [], torch.zeros(())
        for datum in data:
            ids = torch.tensor([datum.model_input.to_ints()])
            targets = torch.tensor(list(datum.loss_fn_inputs["target_tokens"].data))
            given = datum.loss_fn_inputs.get("weights")
            weights = torch.ones(len(targets))
            if given is not None:
                weights = torch.tensor(list(given.data))
            scores = model(ids).logits[0].log_softmax(-1)
            own = scores.gather(-1, targets[:, None])[:, 0]
            logps.append(own.detach().numpy())
            total = total - (own * weights).sum()
        return np.concatenate(logps), total
