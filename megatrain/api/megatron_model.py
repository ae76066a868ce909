"""A model on Megatron, as a script sees it.

In mode 'local' every rank calls the same methods in one order; in mode 'driver' and 'ray' one
script calls them, and the ranks are other processes.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from megatrain.api.checkpoints import Checkpoints
from megatrain.api.inputs import Inputs
from megatrain.api.mixed_call import MixedCall
from megatrain.api.session import open_model
from megatrain.bus import commands
from megatrain.bus.adapter_names import resolve, resolve_pass
from megatrain.config.lora import LoraSpec
from megatrain.config.model import ModelConfig
from megatrain.errors import ConfigError
from megatrain.parallel.layout import DeviceMesh
from megatrain.types import InputFeature, StepOutput

AdapterNames = str | Sequence[str] | None
"""An adapter; or one a datum; None is the first that is trained."""
BASE = ""
"""Stands for the base model where an adapter is named."""


class MegatronModel(Checkpoints):
    """A Hugging Face checkpoint spread over the ranks of `initialize`'s mesh, to train with LoRA.

    Args:
        model_id: a folder, a hub id, `hf://id` or `ms://id`.
        device_mesh: the session's mesh; if `initialize` was not called, it is called with this.
        remote_group: the group of ranks that holds it, where `initialize` made several.
        mixed_precision: `no` (float32), `bf16` or `fp16` (inference only).
        options: further fields of megatrain.config.model.ModelConfig.

    Raises ConfigError, LayoutError, CheckpointError or UnknownFamilyError.  Collective.
    """

    def __init__(
        self,
        model_id: str,
        *,
        device_mesh: DeviceMesh | None = None,
        remote_group: str | None = None,
        mixed_precision: str = "bf16",
        **options: Any,
    ) -> None:
        given = {"mixed_precision": mixed_precision, **options}
        try:
            ModelConfig(**given)
        except ValidationError as error:
            raise ConfigError(f"MegatronModel does not take these options: {error}") from error
        self.model_id = model_id
        command = commands.OpenModel(
            model_id=str(model_id),
            options=given,
            layout=None if device_mesh is None else device_mesh.to_dict(),
        )
        self._engine = open_model(command, device_mesh, remote_group)
        self._inputs: defaultdict[str, Inputs] = defaultdict(Inputs)

    @property
    def _trainer(self) -> Any:
        """What trains it on this rank; in mode 'local' only."""
        return self._engine.host.trainer

    @property
    def _network(self) -> Any:
        return self._trainer.network

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that are trained, in the order in which they were added; "" is the base."""
        return list(self._engine.trained)

    def _call(self, command: Any, /, **fields: Any) -> Any:
        return self._engine.call(command(model=self._engine.key, **fields))

    def _name(self, adapter_name: str | None) -> str:
        return resolve(adapter_name, self._engine.trained)

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
        self._call(
            commands.AddAdapter, adapter=adapter_name, lora=asdict(spec), accumulation_steps=steps
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter with its optimizer and gradients; the others stay as they are."""
        self._call(commands.DeleteAdapter, adapter=adapter_name)
        self._inputs.pop(adapter_name, None)

    def set_optimizer(
        self, optimizer_cls: str = "AdamW", *, adapter_name: str | None = None, **options: Any
    ) -> None:
        """Choose AdamW ("default"), Adam, SGD or Muon, with torch's own options (lr, betas, ...).

        Further options: `no_decay` (patterns of names without weight decay), `loraplus_lr_ratio`,
        `offload_optimizer`, and Muon's (train/muon.py).  On a model without adapters, all
        parameters are trained from here on.  Collective.
        """
        self._call(commands.SetOptimizer, adapter=adapter_name, kind=optimizer_cls, options=options)

    def set_lr_scheduler(
        self, scheduler_cls: str, *, adapter_name: str | None = None, **options: Any
    ) -> None:
        """Choose a schedule: one of Transformers' by name, such as "cosine", with its options.

        Also ConstantWarmupScheduler, LinearWarmupScheduler and CosineWarmupScheduler
        (num_warmup_steps, num_training_steps), and Megatron's "default" (lr_decay_steps, max_lr).
        """
        self._call(commands.SetSchedule, adapter=adapter_name, kind=scheduler_cls, options=options)

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
        self._call(
            commands.SetLoss,
            adapter=adapter_name,
            spec=loss_cls,
            options=options,
            trust=trust_remote_code,
        )

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
        applied: bool = self._call(
            commands.ApplyPatch, spec=patch_cls, options=options, trust=trust_remote_code
        )
        return applied

    def forward_backward(
        self,
        *,
        inputs: Sequence[InputFeature],
        adapter_name: AdapterNames = None,
        micro_batch_size: int | None = None,
        **loss_inputs: Any,
    ) -> StepOutput:
        """Add the gradients of a global batch to an adapter; return loss and log-probabilities.

        `loss_inputs` are what the loss takes (old_logps, advantages, ref_logps, ...): a list with
        one entry a datum, each one number, or a number for each label.  `micro_batch_size` data
        are in a micro-batch, instead of what the model was made with.

        With a list in `adapter_name`, one name a datum, each datum goes to its own adapter, under
        that adapter's loss, all in one pass where they can share one; `loss_inputs` are None where
        a datum's loss takes no such input.  See StepOutput.adapters and StepOutput.errors.
        """
        command, finish = self._pass(True, adapter_name, inputs, micro_batch_size, loss_inputs)
        output: StepOutput = finish(self._engine.call(command))
        return output

    def forward_backward_async(
        self,
        *,
        inputs: Sequence[InputFeature],
        adapter_name: AdapterNames = None,
        micro_batch_size: int | None = None,
        timeout_s: float | None = None,
        **loss_inputs: Any,
    ) -> "Future[StepOutput]":
        """Queue a forward_backward and return its future.

        Commands are done in the order of the calls; a queued one can be cancelled.  `timeout_s` is
        the deadline on the ranks, instead of the kind's own.  In mode 'local' it is done at once.
        """
        command, finish = self._pass(True, adapter_name, inputs, micro_batch_size, loss_inputs)
        return self._engine.submit(command, timeout_s, finish)

    def forward_only(
        self,
        *,
        inputs: Sequence[InputFeature],
        adapter_name: AdapterNames = None,
        micro_batch_size: int | None = None,
        **loss_inputs: Any,
    ) -> StepOutput:
        """Return log-probabilities and the loss under an adapter; without adapters, the base.

        `adapter_name` "" asks for the base although there are adapters; a list is as in
        forward_backward.  A loss that needs inputs which the call has not, or whole pairs, is
        replaced by the cross-entropy.
        """
        command, finish = self._pass(False, adapter_name, inputs, micro_batch_size, loss_inputs)
        output: StepOutput = finish(self._engine.call(command))
        return output

    def forward_only_async(
        self,
        *,
        inputs: Sequence[InputFeature],
        adapter_name: AdapterNames = None,
        micro_batch_size: int | None = None,
        timeout_s: float | None = None,
        **loss_inputs: Any,
    ) -> "Future[StepOutput]":
        """Queue a forward_only and return its future, as forward_backward_async does."""
        command, finish = self._pass(False, adapter_name, inputs, micro_batch_size, loss_inputs)
        return self._engine.submit(command, timeout_s, finish)

    def _pass(
        self,
        train: bool,
        adapters: AdapterNames,
        inputs: Any,
        micro_batch_size: int | None,
        loss_inputs: dict[str, Any],
    ) -> tuple[Any, Callable[[Any], StepOutput]]:
        """Return the command of a pass, and what makes a StepOutput of its result."""
        key, known = self._engine.key, self._engine.trained
        if adapters is None or isinstance(adapters, str):
            name = resolve_pass(adapters, known, train=train)
            kind = commands.ForwardBackward if train else commands.Forward
            return kind(
                model=key,
                adapter=name,
                inputs=inputs,
                loss_inputs=loss_inputs,
                micro_batch_size=micro_batch_size,
                prepare=self._inputs_of(name),
            ), lambda output: output
        if micro_batch_size is not None:
            raise ConfigError(
                f"micro_batch_size={micro_batch_size} has no effect on a pass of several adapters",
                hint="MegatronModel(max_tokens_per_microbatch=...) bounds their micro-batches",
            )
        call = MixedCall(adapters, inputs, loss_inputs, self._inputs_of)
        for batch in call.batches:
            resolve_pass(batch.adapter, known, train=train)
        many = commands.ForwardBackwardMany if train else commands.ForwardMany
        return many(model=key, batches=call.batches), call.output

    def _inputs_of(self, name: str) -> Inputs:
        known = self._engine.trained
        return self._inputs[name if name in known else next(iter(known), BASE)]

    def clip_grad_and_step(
        self, max_grad_norm: float = 1.0, *, adapter_name: str | None = None
    ) -> float | None:
        """Clip, step, zero and move the schedule, on every n-th call; return the norm before."""
        norm: float | None = self._call(
            commands.ClipGradAndStep, adapter=adapter_name, max_grad_norm=max_grad_norm
        )
        return norm

    def clip_grad_and_step_async(
        self,
        max_grad_norm: float = 1.0,
        *,
        adapter_name: str | None = None,
        timeout_s: float | None = None,
    ) -> "Future[float | None]":
        """Queue a clip_grad_and_step and return its future, as forward_backward_async does."""
        command = commands.ClipGradAndStep(
            model=self._engine.key, adapter=adapter_name, max_grad_norm=max_grad_norm
        )
        return self._engine.submit(command, timeout_s)

    def clip_grad_norm(
        self, max_grad_norm: float = 1.0, *, adapter_name: str | None = None
    ) -> float:
        """Sum gradients over ranks, clip their global norm, return it as it was."""
        norm: float = self._call(
            commands.ClipGradNorm, adapter=adapter_name, max_grad_norm=max_grad_norm
        )
        return norm

    def step(self, *, adapter_name: str | None = None) -> None:
        """Let the optimizer change the adapter."""
        self._call(commands.Step, adapter=adapter_name)

    def zero_grad(self, *, adapter_name: str | None = None) -> None:
        """Forget the gradients."""
        self._call(commands.ZeroGrad, adapter=adapter_name)

    def lr_step(self, *, adapter_name: str | None = None) -> None:
        """Move the learning rate schedule on."""
        self._call(commands.LrStep, adapter=adapter_name)

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
        if not is_training:
            raise ConfigError(
                "calculate_metric has training metrics only: is_training=False",
                hint="forward_only returns loss and logps of an evaluation batch",
            )
        metrics: dict[str, float] = self._call(commands.CalculateMetric, adapter=adapter_name)
        return metrics

    def get_train_configs(self, *, adapter_name: str | None = None) -> str:
        """Return one line that says what is trained, how, and on which layout."""
        line: str = self._call(commands.DescribeTraining, adapter=adapter_name)
        return line

    def get_state_dict(self, *, adapter_name: str | None = None) -> dict[str, Any] | None:
        """Return what is trained by Hugging Face's names on rank 0, None elsewhere.  Collective."""
        tensors: dict[str, Any] | None = self._call(commands.GetState, adapter=adapter_name)
        return tensors

    def get_gradients(self, *, adapter_name: str | None = None) -> dict[str, Any] | None:
        """Return the gradient that a step would see now, by name; None on ranks other than 0.

        float32 tensors, summed over ranks and divided as at a step; nothing changes.  Raises
        StateError if there is none.  Collective.
        """
        gradients: dict[str, Any] | None = self._call(
            commands.GetState, adapter=adapter_name, gradients=True
        )
        return gradients

    def close(self) -> None:
        """Forget the model and all that was trained of it; nothing can be called after this."""
        self._call(commands.CloseModel)
