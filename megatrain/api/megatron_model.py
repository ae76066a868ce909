"""A model on Megatron, as a script sees it.  Every rank calls the same methods in the same order."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatrain.api.session import current_session
from megatrain.config.lora import LoraSpec
from megatrain.config.model import ModelConfig
from megatrain.errors import ConfigError, StateError
from megatrain.types import InputFeature, StepOutput

ADAPTER = "default"
"""The adapter that methods mean when none is named."""


class MegatronModel:
    """A Hugging Face checkpoint spread over the ranks of `initialize`'s mesh, to train with LoRA.

    Args:
        model_id: a folder, a hub id, `hf://id` or `ms://id`.
        mixed_precision: `no` (float32), `bf16` or `fp16` (inference only).
        options: further fields of megatrain.config.model.ModelConfig.

    Raises ConfigError, LayoutError, CheckpointError or UnknownFamilyError.  Collective.
    """

    def __init__(self, model_id: str, *, mixed_precision: str = "bf16", **options: Any) -> None:
        try:
            config = ModelConfig(mixed_precision=mixed_precision, **options)  # type: ignore[arg-type]
        except ValidationError as error:
            raise ConfigError(f"MegatronModel does not take these options: {error}") from error
        self._session = current_session()
        self.model_id = model_id
        from megatrain.api import local  # noqa: PLC0415 - imports torch and Megatron

        self._engine = local
        self._trainer = local.open_model(str(model_id), config, self._session)
        self._network = self._trainer.network
        self._metrics = _Metrics()

    def add_adapter_to_model(
        self,
        adapter_name: str,
        config: Any,
        *,
        gradient_accumulation_steps: int = 1,
    ) -> None:
        """Inject a LoRA adapter.  `config` is a peft.LoraConfig, a dict of its fields or a LoraSpec.

        Raises ConfigError for what is not supported, by name, before anything has changed.
        """
        spec = LoraSpec.from_any(config)
        if gradient_accumulation_steps < 1:
            raise ConfigError(
                f"gradient_accumulation_steps must be at least 1: {gradient_accumulation_steps}"
            )
        self._network.add_adapter(adapter_name, spec, seed=self._session.seed)
        self._trainer.add(adapter_name, accumulation_steps=gradient_accumulation_steps)

    def set_optimizer(
        self, optimizer_cls: str = "AdamW", *, adapter_name: str = ADAPTER, **options: Any
    ) -> None:
        """Choose AdamW, Adam or SGD with torch's own options (lr, betas, eps, weight_decay, ...)."""
        self._check(adapter_name)
        self._trainer.set_optimizer(adapter_name, optimizer_cls, options)

    def set_lr_scheduler(
        self, scheduler_cls: str, *, adapter_name: str = ADAPTER, **options: Any
    ) -> None:
        """Choose a schedule: ConstantWarmupScheduler, LinearWarmupScheduler, CosineWarmupScheduler.

        Options: num_warmup_steps, and num_training_steps for linear and cosine.
        """
        self._check(adapter_name)
        self._trainer.set_schedule(adapter_name, scheduler_cls, options)

    def forward_backward(
        self, *, inputs: Sequence[InputFeature], adapter_name: str = ADAPTER
    ) -> StepOutput:
        """Add the gradients of a global batch to an adapter; return its loss and log-probabilities."""
        self._check(adapter_name)
        start = time.perf_counter()
        output = self._trainer.forward_backward(adapter_name, inputs)
        self._metrics.add(output, inputs, time.perf_counter() - start)
        return output

    def forward_only(
        self, *, inputs: Sequence[InputFeature], adapter_name: str | None = None
    ) -> StepOutput:
        """Return log-probabilities under an adapter; without adapters, under the base.

        `adapter_name` "" asks for the base although there are adapters.
        """
        if adapter_name is None:
            adapter_name = ADAPTER if ADAPTER in self._network.adapters else ""
        if adapter_name:
            self._check(adapter_name)
        return self._trainer.forward_only(adapter_name or None, inputs)

    def clip_grad_and_step(
        self, max_grad_norm: float = 1.0, *, adapter_name: str = ADAPTER
    ) -> float | None:
        """Clip, step, zero and move the schedule, on every n-th call; return the norm before."""
        self._check(adapter_name)
        norm = self._trainer.clip_grad_and_step(adapter_name, max_grad_norm)
        self._metrics.grad_norm = norm if norm is not None else self._metrics.grad_norm
        return norm

    def clip_grad_norm(self, max_grad_norm: float = 1.0, *, adapter_name: str = ADAPTER) -> float:
        """Sum gradients over ranks, clip their global norm, return it as it was."""
        self._check(adapter_name)
        norm = self._trainer.clip_grad_norm(adapter_name, max_grad_norm)
        self._metrics.grad_norm = norm
        return norm

    def step(self, *, adapter_name: str = ADAPTER) -> None:
        """Let the optimizer change the adapter."""
        self._check(adapter_name)
        self._trainer.step(adapter_name)

    def zero_grad(self, *, adapter_name: str = ADAPTER) -> None:
        """Forget the gradients."""
        self._check(adapter_name)
        self._trainer.trained[adapter_name].gradients.zero()

    def lr_step(self, *, adapter_name: str = ADAPTER) -> None:
        """Move the learning rate schedule on."""
        self._check(adapter_name)
        self._trainer.lr_step(adapter_name)

    def calculate_metric(
        self, is_training: bool = True, *, adapter_name: str = ADAPTER
    ) -> dict[str, float]:
        """Return metrics of the training calls since the last time, and start anew.

        Keys: loss (mean over label tokens), tokens, label_tokens, tokens_per_second, and, once
        known, lr, grad_norm, step.
        """
        self._check(adapter_name)
        if not is_training:
            raise ConfigError(
                "calculate_metric has training metrics only: is_training=False",
                hint="forward_only returns loss and logps of an evaluation batch",
            )
        trained = self._trainer.trained[adapter_name]
        result = self._metrics.take()
        if trained.optimizer is not None:
            result["lr"] = float(trained.optimizer.param_groups[0]["lr"])
        result["step"] = float(trained.step)
        return result

    def get_train_configs(self, *, adapter_name: str = ADAPTER) -> str:
        """Return one line that says what is trained, how, and on which layout."""
        self._check(adapter_name)
        trained, spec = (
            self._trainer.trained[adapter_name],
            self._network.adapters[adapter_name].spec,
        )
        mesh, config = self._session.groups.mesh, self._network.config
        optimizer = type(trained.optimizer).__name__ if trained.optimizer else "none"
        return (
            f"model={self.model_id} layout={mesh.describe()} "
            f"mixed_precision={config.mixed_precision} adapter={adapter_name} r={spec.r} "
            f"lora_alpha={spec.lora_alpha} target_modules={spec.target_modules} "
            f"optimizer={optimizer} gradient_accumulation_steps={trained.accumulation_steps}"
        )

    def get_state_dict(self, *, adapter_name: str = ADAPTER) -> dict[str, Any] | None:
        """Return the whole adapter by Hugging Face names on rank 0, None elsewhere.  Collective."""
        self._check(adapter_name)
        return self._engine.gather_adapter(
            self._network.adapters[adapter_name], self._session.groups
        )

    def save(
        self, name: str, output_dir: str | Path = "output", *, adapter_name: str = ADAPTER
    ) -> str:
        """Write the adapter as a PEFT directory `output_dir/name`, verify it, return its path.

        Raises ExportError, and leaves what was there before, if the file does not hold what was
        trained.  Collective.
        """
        self._check(adapter_name)
        directory = Path(output_dir) / name
        self._engine.save_adapter(
            directory,
            self._network.adapters[adapter_name],
            self._session.groups,
            base_model=self.model_id,
            folder=self._network.folder,
        )
        return str(directory)

    def _check(self, adapter_name: str) -> None:
        if adapter_name not in self._network.adapters:
            known = ", ".join(self._network.adapters) or "none"
            raise StateError(
                f"there is no adapter called {adapter_name!r}; known: {known}",
                hint="call add_adapter_to_model first",
            )


class _Metrics:
    """Sums over the calls since the last report."""

    def __init__(self) -> None:
        self.grad_norm: float | None = None
        self._reset()

    def _reset(self) -> None:
        self.loss_sum, self.label_tokens, self.tokens, self.seconds = 0.0, 0, 0, 0.0

    def add(self, output: StepOutput, inputs: Sequence[InputFeature], seconds: float) -> None:
        self.loss_sum += output.loss * output.num_tokens
        self.label_tokens += output.num_tokens
        self.tokens += sum(len(item["input_ids"]) for item in inputs)
        self.seconds += seconds

    def take(self) -> dict[str, float]:
        result = {"tokens": float(self.tokens), "label_tokens": float(self.label_tokens)}
        if self.label_tokens:
            result["loss"] = self.loss_sum / self.label_tokens
            result["tokens_per_second"] = self.tokens / self.seconds
        if self.grad_norm is not None:
            result["grad_norm"] = self.grad_norm
        self._reset()
        return result
