"""What vLLM 0.32 does wrongly with LoRA in its workers, done rightly.

1. On processors, rows of the base that share a batch with an adapter's get the last slot's adapter:
   their index is -1, and a tensor is asked for its row -1.
2. Prompts are scored with one row for each token, but an adapter of the head is given the adapters
   of the rows that are sampled: other rows, of another number.  On processors the engine ends.

T rows, I and O features, R rank.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_rows: slice | None = None
"""Tokens of this step whose logits are computed now for a prompt's scores."""


def install() -> None:
    """Replace what is wrong, in this process."""
    if current_platform.is_cpu():
        _leave_out_the_base()
        importlib.import_module("megatrain_vllm.processors").install()
    _score_in_the_older_runner()
    _score_in_the_newer_runner()
    _add_by_token_to_the_head()


def _leave_out_the_base() -> None:
    for module in (lora_ops, punica_cpu):
        module.bgmv_shrink = shrink


def shrink(x: Tensor, a: Tensor, out: Tensor, slots: Tensor, scaling: float = 1.0) -> None:
    """Write `scaling * x A^T`, (T, R), with each row's own A (slots, [1,] R, I); 0 for slot -1."""
    chosen = a[slots.clamp_min(0)].to(out.dtype)
    if chosen.dim() == 4:
        chosen = chosen.squeeze(1)
    product = torch.einsum("ti,tri->tr", x.to(out.dtype), chosen)
    out[:, : product.shape[1]] = scaling * product * (slots >= 0)[:, None]


def _score_in_the_older_runner() -> None:
    """On processors, and where VLLM_USE_V2_MODEL_RUNNER=0."""
    score = GPUModelRunner._get_prompt_logprobs_dict

    def scored(runner: Any, hidden_states: Tensor, *others: Any) -> Any:
        model = runner.model
        model.compute_logits = _telling(model.compute_logits, hidden_states)
        try:
            return score(runner, hidden_states, *others)
        finally:
            del model.compute_logits  # the class has its own

    GPUModelRunner._get_prompt_logprobs_dict = scored


def _score_in_the_newer_runner() -> None:
    def told(score: Callable[..., Any]) -> Callable[..., Any]:
        def scored(worker: Any, logits_fn: Any, hidden_states: Tensor, *others: Any) -> Any:
            return score(worker, _telling(logits_fn, hidden_states), hidden_states, *others)

        return scored

    for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
        setattr(PromptLogprobsWorker, name, told(getattr(PromptLogprobsWorker, name)))


def _telling(compute_logits: Callable[..., Any], hidden_states: Tensor) -> Callable[..., Any]:
    """Note which rows of this step's `hidden_states` the logits are of."""

    def compute(part: Tensor) -> Any:
        global _rows
        row = hidden_states.stride(0) * hidden_states.element_size()
        start = (part.data_ptr() - hidden_states.data_ptr()) // row
        _rows = slice(start, start + len(part))
        try:
            return compute_logits(part)
        finally:
            _rows = None

    return compute


def _add_by_token_to_the_head() -> None:
    get_logits = LogitsProcessorWithLoRA._get_logits

    def logits_of(layer: Any, *inputs: Any, **more: Any) -> Any:
        if _rows is None:
            return get_logits(layer, *inputs, **more)
        wrapper = layer.punica_wrapper
        layer.punica_wrapper = _ByToken(wrapper.token_lora_indices[_rows])
        try:
            return get_logits(layer, *inputs, **more)
        finally:
            layer.punica_wrapper = wrapper

    LogitsProcessorWithLoRA._get_logits = logits_of


class _ByToken:
    """Stands in for the head's punica wrapper while a prompt is scored."""

    def __init__(self, slots: Tensor) -> None:
        """`slots` [T]: of each row's adapter; -1 is the base."""
        self._slots = slots

    def add_lora_logits(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Add `scale * x A^T B^T` to y, (T, O); a (slots, 1, R, I), b (slots, 1, O, R)."""
        for slot in self._slots.unique().tolist():
            if slot >= 0:
                rows = self._slots == slot
                delta = x[rows].float() @ a[slot, 0].float().T @ b[slot, 0].float().T
                y[rows, : delta.shape[1]] += (scale * delta).to(y.dtype)
        return y
