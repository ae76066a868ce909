"""One model on one rank, and what each command about it does.

Every rank runs the same commands in one order, be they calls of a script that every rank runs or
messages of a driver.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any, assert_never

from pydantic import ValidationError

from megatrain.bus import engine
from megatrain.bus.adapter_names import resolve
from megatrain.bus.commands import (
    AddAdapter,
    ApplyPatch,
    CalculateMetric,
    ClipGradAndStep,
    ClipGradNorm,
    Command,
    DeleteAdapter,
    DescribeTraining,
    Forward,
    ForwardBackward,
    ForwardBackwardMany,
    ForwardMany,
    GetState,
    Load,
    LrStep,
    ModelCommand,
    OpenModel,
    Resume,
    Save,
    SetLoss,
    SetOptimizer,
    SetSchedule,
    Step,
    WaitForSave,
    ZeroGrad,
)
from megatrain.bus.metrics import Metrics
from megatrain.bus.residents import Residents
from megatrain.config.lora import LoraSpec
from megatrain.config.model import ModelConfig
from megatrain.errors import ConfigError, MegatrainError, StateError
from megatrain.export.state.collect import gradients
from megatrain.parallel import phase
from megatrain.parallel.joined import Session
from megatrain.train.loss import Loss
from megatrain.train.mixed_collect import Results
from megatrain.train.mixed_step import check_shares, own_loss, run_mixed
from megatrain.train.step import BASE, Trainer
from megatrain.train.utilisation import Utilisation
from megatrain.types import StepOutput


class ModelHost:
    """A model that is open on this rank."""

    def __init__(self, command: OpenModel, session: Session) -> None:
        """Load it.  Raises ConfigError, LayoutError, CheckpointError, UnknownFamilyError."""
        self.opened, self.session = command, session
        config = model_config(command)
        self.trainer: Trainer = engine.open_model(command.model_id, config, session)
        self.residents = Residents(
            self.trainer,
            seed=session.seed,
            max_loras=config.max_loras,
            max_cpu_loras=config.max_cpu_loras,
        )
        self._utilisation = Utilisation(self.trainer.network)
        self.metrics: dict[str, Metrics] = {}
        self.loss_choices: dict[str, SetLoss] = {}
        """The last SetLoss of each adapter that has had one."""
        self.last_source = ""
        """Digest of what the last Load or Resume has read."""
        self.patches: list[ApplyPatch] = []
        """Patches that were applied, in order."""

    @property
    def trained(self) -> list[str]:
        """Names of what is trained: adapters, or the base alone."""
        return list(self.residents.names)

    def loss(self, adapter: str | None) -> Loss | None:
        """Return what an adapter minimises; None if there is no such adapter."""
        name = self.trained[0] if adapter is None and self.trained else adapter
        return self.residents.loss(name) if name in self.trained else None

    def check(self, command: Command) -> None:
        """Raise StateError for a command about something that is not there; change nothing."""
        match command:
            case SetOptimizer(adapter=None) if not self.trained:
                return
            case AddAdapter(adapter=name) if name in self.trained:
                raise StateError(
                    f"there is already an adapter called {name!r}",
                    hint="delete_adapter removes it; load and resume_from_checkpoint change it",
                )
            case AddAdapter() | WaitForSave() | ApplyPatch() | Load() | Resume() | OpenModel():
                return
            case ForwardBackwardMany(batches=batches) | ForwardMany(batches=batches):
                for batch in batches:
                    if isinstance(command, ForwardBackwardMany) or batch.adapter != BASE:
                        self.name(batch.adapter)
            case Forward(adapter=name) if name == BASE or not (name or self.trained):
                return
            case _:
                self.name(getattr(command, "adapter", BASE))

    def name(self, adapter: str | None) -> str:
        """Return the adapter that is meant: the first one if none is named, or the base."""
        return resolve(adapter, self.trained)

    def run(self, command: ModelCommand) -> Any:
        """Do what the command says, and return its result.  Collective."""
        if isinstance(command, ForwardBackwardMany | ForwardMany):
            return self._many(command)
        adapter = getattr(command, "adapter", None)
        named = self.trained[0] if adapter is None and self.trained else adapter
        if named in self.trained and not isinstance(command, DeleteAdapter):
            self.residents.bring([named])
        try:
            return self._run(command)
        finally:
            self.residents.added()

    def _run(self, command: ModelCommand) -> Any:
        trainer = self.trainer
        match command:
            case ForwardBackward():
                return self._forward_backward(command)
            case Forward():
                return self._forward(command)
            case ClipGradAndStep():
                name = self.name(command.adapter)
                norm = trainer.clip_grad_and_step(name, command.max_grad_norm, command.options)
                return norm if norm is None else self._set_norm(name, norm)
            case ClipGradNorm():
                name = self.name(command.adapter)
                return self._set_norm(name, trainer.clip_grad_norm(name, command.max_grad_norm))
            case Step():
                return trainer.step(self.name(command.adapter))
            case ZeroGrad():
                return trainer.zero_grad(self.name(command.adapter))
            case LrStep():
                return trainer.lr_step(self.name(command.adapter))
            case CalculateMetric():
                return self._metric(self.name(command.adapter))
            case DescribeTraining():
                return self._describe(self.name(command.adapter))
            case _:
                return self._set_up(command)

    def _set_up(  # noqa: C901 - one short case a command
        self,
        command: ForwardBackwardMany
        | ForwardMany
        | AddAdapter
        | DeleteAdapter
        | SetOptimizer
        | SetSchedule
        | SetLoss
        | ApplyPatch
        | GetState
        | Save
        | WaitForSave
        | Load
        | Resume,
    ) -> Any:
        trainer = self.trainer
        match command:
            case AddAdapter():
                return self._add(command)
            case DeleteAdapter():
                return self._delete(self.name(command.adapter))
            case SetOptimizer():
                return self._set_optimizer(command)
            case SetSchedule():
                name = self.name(command.adapter)
                return trainer.set_schedule(name, command.kind, dict(command.options))
            case SetLoss():
                return self._set_loss(command)
            case ApplyPatch():
                return self._apply_patch(command)
            case GetState():
                read = gradients if command.gradients else engine.state_dict
                return read(trainer, self.name(command.adapter))
            case Save():
                return self._save(command)
            case WaitForSave():
                return engine.wait_for_save(trainer)
            case Load():
                place, residents = command.place, self.residents
                self.last_source = engine.load(
                    trainer, command.adapter, place, residents, optimizer=command.optimizer
                )
                return None
            case Resume():
                return self._resume(command)
            case ForwardBackwardMany() | ForwardMany():
                return self._many(command)
            case _:
                assert_never(command)

    def _forward_backward(self, command: ForwardBackward) -> StepOutput:
        name = self.name(command.adapter)
        start = time.perf_counter()
        output = self.trainer.forward_backward(
            name,
            command.inputs,
            command.loss_inputs,
            micro_batch_size=command.micro_batch_size,
            prepare=command.prepare,
        )
        self.metrics_of(name).add(output, time.perf_counter() - start)
        return output

    def _forward(self, command: Forward) -> StepOutput:
        adapter = command.adapter
        base = adapter == BASE or (adapter is None and not self.trained)
        return self.trainer.forward_only(
            BASE if base else self.name(adapter),
            command.inputs,
            command.loss_inputs,
            micro_batch_size=command.micro_batch_size,
            prepare=command.prepare,
        )

    def _many(self, command: ForwardBackwardMany | ForwardMany) -> Results:
        """Run a pass of several adapters; of more than fit on the device, one after the other."""
        train, results = isinstance(command, ForwardBackwardMany), Results()
        at_once = self.trainer.network.config.max_loras or len(command.batches) or 1
        if train and len(command.batches) > at_once:
            losses = {
                each.adapter: own_loss(each) or self.residents.loss(each.adapter)
                for each in command.batches
            }
            check_shares(self.trainer.network, command.batches, losses)
        for start in range(0, len(command.batches), at_once):
            batches = command.batches[start : start + at_once]
            self.residents.bring([each.adapter for each in batches if each.adapter in self.trained])
            began = time.perf_counter()
            try:
                some = run_mixed(self.trainer, batches, train=train)
            except MegatrainError as error:
                if not results:
                    raise
                # Those before have their gradients: what is wrong is these adapters' own.
                some = Results({each.adapter: error for each in batches})
            if train:
                self._count(some, time.perf_counter() - began)
            results |= some
        return results

    def _count(self, results: Results, seconds: float) -> None:
        """Count a pass for each adapter, with its share of the time by tokens."""
        outputs = {name: each for name, each in results.items() if isinstance(each, StepOutput)}
        tokens = {name: sum(map(len, each.logps)) for name, each in outputs.items()}
        for name, output in outputs.items():
            share = tokens[name] / max(1, sum(tokens.values()))
            self.metrics_of(name).add(output, seconds * share)

    def _add(self, command: AddAdapter) -> None:
        engine.add_adapter(
            self.trainer,
            command.adapter,
            LoraSpec.from_any(dict(command.lora)),
            seed=self.session.seed if command.seed is None else command.seed,
            accumulation_steps=command.accumulation_steps,
            optimizer=command.optimizer,
        )

    def _delete(self, name: str) -> None:
        self.residents.removed(name)
        self.metrics.pop(name, None)
        self.loss_choices.pop(name, None)

    def _set_optimizer(self, command: SetOptimizer) -> None:
        options = dict(command.options)
        if command.adapter is None and not self.trained:
            self.trainer.train_base(command.kind, options)
            return
        self.trainer.set_optimizer(self.name(command.adapter), command.kind, options)

    def _set_loss(self, command: SetLoss) -> None:
        name, options = self.name(command.adapter), dict(command.options)
        engine.set_loss(self.trainer, name, command.spec, options, trust=command.trust)
        self.loss_choices[name] = command
        self.metrics.pop(name, None)

    def _apply_patch(self, command: ApplyPatch) -> bool:
        options = dict(command.options)
        applied = engine.apply_patch(self.trainer, command.spec, options, trust=command.trust)
        self.patches.append(command)
        return applied

    def _resume(self, command: Resume) -> dict[str, Any]:
        place, self.last_source = engine.resume(
            self.trainer,
            command.adapter,
            Path(command.checkpoint),
            self.residents,
            use_previous=command.use_previous,
            with_optimizer=command.with_optimizer,
            optimizer=command.optimizer,
        )
        return place

    def _save(self, command: Save) -> str:
        phase.enter(phase.SAVING)
        engine.save(
            self.trainer,
            self.name(command.adapter),
            Path(command.directory),
            self.opened.model_id,
            save_optimizer=command.save_optimizer,
            consumed_train_samples=command.consumed_train_samples,
            background=command.background,
        )
        return command.directory

    def metrics_of(self, name: str) -> Metrics:
        """Return what is counted of an adapter since it was last asked for."""
        if name not in self.metrics:
            self.metrics[name] = Metrics(partial(self._utilisation, is_frozen=name != BASE))
        return self.metrics[name]

    def _set_norm(self, name: str, norm: float) -> float:
        self.metrics_of(name).grad_norm = norm
        return norm

    def _metric(self, name: str) -> dict[str, float]:
        trained = self.trainer.trained[name]
        result = self.metrics_of(name).take()
        if trained.last_lr is not None:
            result["lr"] = trained.last_lr
        result["step"] = float(trained.step)
        return result

    def _describe(self, name: str) -> str:
        trained, network = self.trainer.trained[name], self.trainer.network
        what = "all parameters"
        if name != BASE:
            spec = network.adapters[name].spec
            what = (
                f"adapter={name} r={spec.r} lora_alpha={spec.lora_alpha} "
                f"target_modules={spec.target_modules}"
            )
        optimizer = type(trained.optimizer).__name__ if trained.optimizer else "none"
        return (
            f"model={self.opened.model_id} layout={network.groups.mesh.describe()} "
            f"mixed_precision={network.config.mixed_precision} {what} optimizer={optimizer} "
            f"gradient_accumulation_steps={trained.accumulation_steps}"
        )


def model_config(command: OpenModel) -> ModelConfig:
    """Return a model's options, checked.  Raises ConfigError."""
    try:
        return ModelConfig(**command.options)
    except ValidationError as error:
        raise ConfigError(f"MegatronModel does not take these options: {error}") from error
