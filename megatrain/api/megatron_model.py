"""A model on Megatron, as a script sees it: every rank calls the same methods in one order."""

import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatrain.api.inputs import Inputs
from megatrain.api.metrics import Metrics
from megatrain.api.session import joined_session
from megatrain.config.lora import LoraSpec
from megatrain.config.model import ModelConfig
from megatrain.errors import ConfigError, StateError
from megatrain.parallel.layout import DeviceMesh
from megatrain.types import InputFeature, StepOutput

BASE = ""
"""Stands for the base model where an adapter is named."""


class MegatronModel:
    """A Hugging Face checkpoint spread over the ranks of `initialize`'s mesh, to train with LoRA.

    Args:
        model_id: a folder, a hub id, `hf://id` or `ms://id`.
        device_mesh: the session's mesh; if `initialize` was not called, it is called with this.
        mixed_precision: `no` (float32), `bf16` or `fp16` (inference only).
        options: further fields of megatrain.config.model.ModelConfig.

    Raises ConfigError, LayoutError, CheckpointError or UnknownFamilyError.  Collective.
    """

    def __init__(
        self,
        model_id: str,
        *,
        device_mesh: DeviceMesh | None = None,
        mixed_precision: str = "bf16",
        **options: Any,
    ) -> None:
        try:
            config = ModelConfig(mixed_precision=mixed_precision, **options)  # type: ignore[arg-type]
        except ValidationError as error:
            raise ConfigError(f"MegatronModel does not take these options: {error}") from error
        self._session = joined_session(device_mesh)
        self.model_id = model_id
        from megatrain.api import local  # noqa: PLC0415 - imports torch and Megatron

        self._engine = local
        self._trainer = local.open_model(str(model_id), config, self._session)
        self._network = self._trainer.network
        self._utilisation = local.Utilisation(self._network)
        self._metrics: dict[str, Metrics] = {}
        self._inputs: defaultdict[str, Inputs] = defaultdict(Inputs)

    def add_adapter_to_model(
        self,
        adapter_name: str,
        config: Any,
        *,
        gradient_accumulation_steps: int = 1,
    ) -> None:
        """Inject a LoRA adapter; `config` is a peft.LoraConfig, a dict of its fields, a LoraSpec.

        Raises ConfigError for what is not supported, by name, before anything has changed.
        """
        spec = LoraSpec.from_any(config)
        steps = gradient_accumulation_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ConfigError(f"gradient_accumulation_steps must be an integer >= 1: {steps!r}")
        self._engine.add_adapter(
            self._trainer,
            adapter_name,
            spec,
            seed=self._session.seed,
            accumulation_steps=gradient_accumulation_steps,
        )

    def set_optimizer(
        self, optimizer_cls: str = "AdamW", *, adapter_name: str | None = None, **options: Any
    ) -> None:
        """Choose AdamW ("default"), Adam, SGD or Muon, with torch's own options (lr, betas, ...).

        Further options: `no_decay` (patterns of names without weight decay), `loraplus_lr_ratio`,
        `offload_optimizer`, and Muon's (train/muon.py).  On a model without adapters, all
        parameters are trained from here on.  Collective.
        """
        if adapter_name is None and not self._trainer.trained:
            self._trainer.train_base(optimizer_cls, options)
            return
        self._trainer.set_optimizer(self._name(adapter_name), optimizer_cls, options)

    def set_lr_scheduler(
        self, scheduler_cls: str, *, adapter_name: str | None = None, **options: Any
    ) -> None:
        """Choose a schedule: one of Transformers' by name, such as "cosine", with its options.

        Also ConstantWarmupScheduler, LinearWarmupScheduler and CosineWarmupScheduler
        (num_warmup_steps, num_training_steps), and Megatron's "default" (lr_decay_steps, max_lr).
        """
        name = self._name(adapter_name)
        self._trainer.set_schedule(name, scheduler_cls, options)

    def set_loss(
        self,
        loss_cls: Any,
        *,
        adapter_name: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        """Choose what forward_backward minimises: a name, a subclass of Loss, or a function.

        Options are the loss's own.  `trust_remote_code` allows "file.py:Name" and hub ids, whose
        code is run.  Raises ConfigError for an unknown name or option.
        """
        name = self._name(adapter_name)
        self._engine.set_loss(self._trainer, name, loss_cls, options, trust=trust_remote_code)
        self._metrics.pop(name, None)

    def set_processor(
        self,
        processor_cls: Any,
        *,
        adapter_name: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        """Choose what turns rows into model inputs: a name or a subclass of InputProcessor.

        The base sees what the first adapter sees.  `trust_remote_code` as in set_loss.
        """
        inputs = self._inputs[self._name(adapter_name)]
        inputs.set_processor(processor_cls, options, trust=trust_remote_code)

    def set_template(
        self,
        template_cls: Any,
        model_id: str | None = None,
        *,
        adapter_name: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        """Choose what encodes inputs that are not tokens yet: a name or a subclass of Template.

        It uses the model's own tokenizer unless `model_id` says another.  The base sees what the
        first adapter sees.  `trust_remote_code` as in set_loss.
        """
        self._inputs[self._name(adapter_name)].set_template(
            template_cls, model_id, options, base=str(self.model_id), trust=trust_remote_code
        )

    def apply_patch(
        self, patch_cls: Any, *, trust_remote_code: bool = False, **options: Any
    ) -> bool:
        """Make a named change to the model if it applies; tell whether it did.

        `patch_cls` is a name or a subclass of Patch.  Every rank must call it.
        """
        return self._engine.apply_patch(self._trainer, patch_cls, options, trust=trust_remote_code)

    def forward_backward(
        self,
        *,
        inputs: Sequence[InputFeature],
        adapter_name: str | None = None,
        micro_batch_size: int | None = None,
        **loss_inputs: Any,
    ) -> StepOutput:
        """Add the gradients of a global batch to an adapter; return loss and log-probabilities.

        `loss_inputs` are what the loss takes (old_logps, advantages, ref_logps, ...): a list with
        one entry a datum, each one number, or a number for each label.  `micro_batch_size` data
        are in a micro-batch, instead of what the model was made with.
        """
        name = self._name(adapter_name)
        start = time.perf_counter()
        output = self._trainer.forward_backward(
            name,
            inputs,
            loss_inputs,
            micro_batch_size=micro_batch_size,
            prepare=self._inputs[name],
        )
        self._metrics_of(name).add(output, time.perf_counter() - start)
        return output

    def forward_only(
        self,
        *,
        inputs: Sequence[InputFeature],
        adapter_name: str | None = None,
        micro_batch_size: int | None = None,
        **loss_inputs: Any,
    ) -> StepOutput:
        """Return log-probabilities and the loss under an adapter; without adapters, the base.

        `adapter_name` "" asks for the base although there are adapters.  A loss that needs inputs
        which the call has not, or whole pairs, is replaced by the cross-entropy.
        """
        base = adapter_name == BASE or (adapter_name is None and not self._trainer.trained)
        name = BASE if base else self._name(adapter_name)
        shared = name if name in self._trainer.trained else next(iter(self._trainer.trained), BASE)
        return self._trainer.forward_only(
            name,
            inputs,
            loss_inputs,
            micro_batch_size=micro_batch_size,
            prepare=self._inputs[shared],
        )

    def clip_grad_and_step(
        self, max_grad_norm: float = 1.0, *, adapter_name: str | None = None
    ) -> float | None:
        """Clip, step, zero and move the schedule, on every n-th call; return the norm before."""
        name = self._name(adapter_name)
        norm = self._trainer.clip_grad_and_step(name, max_grad_norm)
        if norm is not None:
            self._metrics_of(name).grad_norm = norm
        return norm

    def clip_grad_norm(
        self, max_grad_norm: float = 1.0, *, adapter_name: str | None = None
    ) -> float:
        """Sum gradients over ranks, clip their global norm, return it as it was."""
        name = self._name(adapter_name)
        norm = self._trainer.clip_grad_norm(name, max_grad_norm)
        self._metrics_of(name).grad_norm = norm
        return norm

    def step(self, *, adapter_name: str | None = None) -> None:
        """Let the optimizer change the adapter."""
        name = self._name(adapter_name)
        self._trainer.step(name)

    def zero_grad(self, *, adapter_name: str | None = None) -> None:
        """Forget the gradients."""
        name = self._name(adapter_name)
        self._trainer.zero_grad(name)

    def lr_step(self, *, adapter_name: str | None = None) -> None:
        """Move the learning rate schedule on."""
        name = self._name(adapter_name)
        self._trainer.lr_step(name)

    def calculate_metric(
        self, is_training: bool = True, *, adapter_name: str | None = None
    ) -> dict[str, float]:
        """Return metrics of the training calls since the last time, and start anew.

        Keys: loss, what the loss reports (token_accuracy among it), tokens, label_tokens,
        tokens_per_second, step, and, of the last step, lr and grad_norm.  For families whose
        arithmetic is known, mfu: what forward and backward need (4 FLOPs a token and parameter for
        an adapter, 6 for all parameters, and attention) over the peak of all devices in the seconds
        of forward_backward; a maker's figure, or a matrix product measured on the first call.
        """
        name = self._name(adapter_name)
        if not is_training:
            raise ConfigError(
                "calculate_metric has training metrics only: is_training=False",
                hint="forward_only returns loss and logps of an evaluation batch",
            )
        trained = self._trainer.trained[name]
        result = self._metrics_of(name).take()
        if trained.last_lr is not None:
            result["lr"] = trained.last_lr
        result["step"] = float(trained.step)
        return result

    def get_train_configs(self, *, adapter_name: str | None = None) -> str:
        """Return one line that says what is trained, how, and on which layout."""
        name = self._name(adapter_name)
        trained = self._trainer.trained[name]
        mesh, config = self._session.groups.mesh, self._network.config
        what = "all parameters"
        if name != BASE:
            spec = self._network.adapters[name].spec
            what = (
                f"adapter={name} r={spec.r} lora_alpha={spec.lora_alpha} "
                f"target_modules={spec.target_modules}"
            )
        optimizer = type(trained.optimizer).__name__ if trained.optimizer else "none"
        return (
            f"model={self.model_id} layout={mesh.describe()} "
            f"mixed_precision={config.mixed_precision} {what} optimizer={optimizer} "
            f"gradient_accumulation_steps={trained.accumulation_steps}"
        )

    def get_state_dict(self, *, adapter_name: str | None = None) -> dict[str, Any] | None:
        """Return what is trained by Hugging Face's names on rank 0, None elsewhere.  Collective."""
        return self._engine.state_dict(self._trainer, self._name(adapter_name))

    def save(
        self,
        name: str,
        output_dir: str | Path = "output",
        save_optimizer: bool = False,
        consumed_train_samples: int | None = None,
        *,
        adapter_name: str | None = None,
        background: bool = False,
    ) -> str:
        """Write what is trained to `output_dir/name`, verify it, return its path.  Collective.

        An adapter becomes a PEFT directory; a model that is trained as a whole, a Hugging Face
        checkpoint.  `save_optimizer` adds all that `resume_from_checkpoint` needs, on any layout,
        in the subfolder `state`; `consumed_train_samples` is kept there for it.  With `background`
        files are written while training goes on; the next save, `wait_for_save` and the end of the
        process wait for them.

        Raises ExportError, and leaves what was there before, if the file does not hold what was
        trained; also for a save in the background that failed before.
        """
        directory = Path(output_dir) / name
        self._engine.save(
            self._trainer,
            self._name(adapter_name),
            directory,
            self.model_id,
            save_optimizer=save_optimizer,
            consumed_train_samples=consumed_train_samples,
            background=background,
        )
        return str(directory)

    def wait_for_save(self) -> None:
        """Wait for a save in the background.  Raises ExportError if it failed.  Collective."""
        self._engine.wait_for_save(self._trainer)

    def load(self, adapter: str | Path, *, adapter_name: str | None = None) -> None:
        """Start from an adapter in PEFT's format: a folder, a hub's id or a URL.  Collective.

        An adapter that is not there yet is made with the options of the file, as "default" unless
        `adapter_name` says another; one that is there must have the same.  Steps begin at 0; an
        optimizer is chosen as for a new adapter.  A whole training state, with its optimizer and
        step, is for `resume_from_checkpoint`.

        Raises CheckpointError or ConfigError, before anything has changed, for a file that is
        damaged, that does not fit the base, or that asks for what is not supported (DoRA).
        """
        self._engine.load(self._trainer, adapter_name, str(adapter))

    def resume_from_checkpoint(
        self,
        resume_from_checkpoint: str | Path,
        *,
        adapter_name: str | None = None,
        use_previous: bool = False,
    ) -> dict[str, Any]:
        """Go on from what `save(save_optimizer=True)` wrote, on any layout.  Collective.

        Returns cur_step, the steps taken, and consumed_train_samples (None if it was not given).
        Adapter, optimizer and schedule are made as they were saved unless they are set already;
        then they must be of the same kind, and options set here count.

        Raises CheckpointError, before anything has changed, for a file that is missing, cut short
        or altered, another base model or other LoRA options; with `use_previous`, damage means
        that the complete checkpoint before it in the same folder is taken, with a warning.
        Raises ConfigError for an optimizer or schedule of another kind.
        """
        path = Path(resume_from_checkpoint)
        return self._engine.resume(self._trainer, adapter_name, path, use_previous=use_previous)

    def _metrics_of(self, name: str) -> Metrics:
        if name not in self._metrics:
            self._metrics[name] = Metrics(partial(self._utilisation, is_frozen=name != BASE))
        return self._metrics[name]

    def _name(self, adapter_name: str | None) -> str:
        """Return the adapter that is meant: the first one if none is named, or the base."""
        known = self._trainer.trained
        if adapter_name is None and known:
            return next(iter(known))
        if adapter_name is None or adapter_name not in known:
            names = ", ".join(repr(name) for name in known) or "none"
            raise StateError(
                f"there is no adapter called {adapter_name!r}; known: {names}",
                hint="call add_adapter_to_model first, or set_optimizer to train all parameters",
            )
        return adapter_name
