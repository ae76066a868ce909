"""A Hugging Face checkpoint as Megatron model chunks on this rank, with its table of names."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.load import load_parameters
from megatrain.checkpoint.names import ParameterTable
from megatrain.checkpoint.open import open_checkpoint
from megatrain.config.lora import LoraSpec
from megatrain.config.model import ModelConfig
from megatrain.errors import ConfigError, StateError, UnknownFamilyError
from megatrain.model.adapter import Adapter
from megatrain.model.base import base_slices, freeze_head, trained_parameters
from megatrain.model.converters import CONVERTERS
from megatrain.model.fsdp import clean_after_error, load_sharded, train_sharded
from megatrain.model.head import Head
from megatrain.model.lora import make_adapter
from megatrain.model.microbatch import MicroBatch
from megatrain.model.mixing import make_ready
from megatrain.model.mixture import ActiveAdapters
from megatrain.model.provider import make_bridge, make_provider
from megatrain.model.score import make_score
from megatrain.model.tensor_slice import TensorSlice, TrainedParameter
from megatrain.parallel import phase
from megatrain.parallel.groups import Groups
from megatrain.platforms.bridge_import import quiet

logger = logging.getLogger(__name__)

LossFunction = Callable[[Tensor, MicroBatch], tuple[Tensor, Tensor]]
"""From the head's rows (R, N) to a scalar that is summed over micro-batches and ranks, and what
to keep of it."""


@dataclass
class Network:
    """Everything of the model that lives on this rank."""

    folder: Path
    config: ModelConfig
    groups: Groups
    provider: Any
    chunks: list[torch.nn.Module]
    table: ParameterTable
    head: Head
    active: ActiveAdapters = field(default_factory=ActiveAdapters)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    trains_base: bool = False
    """Whether the base's own parameters are trained."""
    base_score: TrainedParameter | None = None
    """The score head that is trained with the base, on the last stage of a reward model."""

    @property
    def has_scores(self) -> bool:
        """Tell whether a score head takes the place of log-probabilities."""
        return self.config.task == "reward"

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without padding."""
        return int(self.provider.vocab_size)

    def add_adapter(self, name: str, spec: LoraSpec, *, seed: int) -> Adapter:
        """Inject a LoRA adapter.  No communication."""
        if name in self.adapters:
            raise StateError(f"there is already an adapter called {name!r}")
        self.adapters[name] = make_adapter(
            self.table, spec, seed=seed, name=name, active=self.active
        )
        self.adapters[name].score = self._make_score(seed)
        return self.adapters[name]

    def remove_adapter(self, name: str) -> None:
        """Take an adapter's factors away.  No communication."""
        del self.adapters[name]
        for chunk in self.chunks:
            for module in chunk.modules():
                factors = getattr(module, "lora", None)
                if isinstance(factors, torch.nn.ModuleDict) and name in factors:
                    del factors[name]
        if self.active.name == name:
            self.active.name = self.head.lora = self.head.score_1H = None

    def _make_score(self, seed: int) -> TrainedParameter | None:
        if not self.has_scores or not self.groups.is_last_stage:
            return None
        std = json.loads((self.folder / "config.json").read_text()).get("initializer_range", 0.02)
        size = int(self.provider.hidden_size)
        return make_score(size, seed=seed, std=std, device=self.groups.device)

    def train_base(self, *, seed: int) -> list[TrainedParameter]:
        """Unfreeze the base and return its parameters, a reward model's score head among them.

        The score head starts from `seed` alone.  Raises StateError if there are adapters,
        ConfigError if the family cannot be written back.
        """
        if self.adapters:
            raise StateError(
                f"the base is frozen, since there are adapters: {', '.join(self.adapters)}"
            )
        parameters = trained_parameters(self.table, with_head=not self.has_scores)
        if self.groups.fsdp is not None:
            train_sharded(self.chunks)
        for chunk in self.chunks:
            chunk.requires_grad_()
        if self.has_scores:
            freeze_head(self.table)
        self.trains_base, self.base_score = True, self._make_score(seed)
        return parameters if self.base_score is None else [*parameters, self.base_score]

    def base_slices(self) -> Iterator[TensorSlice]:
        """Yield what this rank holds of the base: for a reward model, a score head in place of the
        output layer.
        """
        yield from base_slices(self.table, with_head=not self.has_scores)
        if self.base_score is not None:
            yield self.base_score.parts[0].of(self.base_score.parameter)

    def freeze_base(self) -> None:
        """Undo train_base."""
        self.trains_base, self.base_score = False, None
        for chunk in self.chunks:
            chunk.requires_grad_(False)

    def activate(self, name: str) -> None:
        """Choose the adapter of the next passes; a name that is none means the base alone."""
        adapter = self.adapters.get(name)
        self.active.name = name if adapter is not None else None
        self.active.mixture = None
        self.head.lora = None if adapter is None else adapter.head
        if self.has_scores and adapter is None and not self.trains_base:
            raise StateError(
                "the base has no score head yet: one is made with what is trained",
                hint="call add_adapter_to_model, or set_optimizer to train all parameters",
            )
        score = self.base_score if adapter is None else adapter.score
        if score is not None:
            self.head.score_1H = score.parameter

    def activate_mixture(self) -> None:
        """Let each micro-batch of the next passes say whose its tokens are."""
        make_ready(self.chunks, self.active, self.groups.tp)
        self.active.name, self.head.lora, self.head.score_1H = None, None, None
        self.head.loras = {name: each.head for name, each in self.adapters.items()}

    def run(
        self, batches: Sequence[MicroBatch], loss: LossFunction, *, train: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Send micro-batches through the pipeline; with `train`, backward as well.

        Returns, of each micro-batch on the last stage, the head's first row (1, N) and what the
        loss keeps; elsewhere empty lists.
        Collective: every rank brings as many micro-batches.
        """
        from megatron.core.pipeline_parallel import (  # noqa: PLC0415 - patched first
            get_forward_backward_func,
        )

        for chunk in self.chunks:
            chunk.train(train)
        step = _ForwardStep(self.head, loss, self.active)
        iterators = [iter(batches) for _ in self.chunks]
        with torch.set_grad_enabled(train), clean_after_error(self.chunks):
            results = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(batches),
                seq_length=max(b.input_ids_1T.shape[1] for b in batches) * self.groups.mesh.cp,
                micro_batch_size=1,
                forward_only=not train,
            )
        return [r["rows"] for r in results], [r["kept"] for r in results]


@dataclass(frozen=True, slots=True)
class _ForwardStep:
    """What Megatron's schedule calls for each micro-batch and model chunk."""

    head: Head
    loss: LossFunction
    active: ActiveAdapters

    def __call__(self, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        phase.enter(phase.FORWARD)
        self.active.mixture = batch.mixture  # for the embedding; each layer says it again
        output = model(
            batch.input_ids_1T,
            batch.positions_1T,
            None,
            packed_seq_params=batch.packed,
            output_processor=self.head,
            output_processor_context=batch,
        )
        return output, _Result(batch, self.loss)


@dataclass(frozen=True, slots=True)
class _Result:
    """From the last stage's output to (loss, tokens, what is kept)."""

    batch: MicroBatch
    loss: LossFunction

    def __call__(self, rows_RN: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = torch.tensor(0, dtype=torch.int, device=rows_RN.device)
        value, kept = self.loss(rows_RN, self.batch)
        phase.enter(phase.BACKWARD)
        # A copy of what is asked for: a view would keep the other rows of every micro-batch.
        return value, tokens, {"rows": rows_RN[:1].detach().clone(), "kept": kept}


def build_network(folder: Path, config: ModelConfig, groups: Groups) -> Network:
    """Make this rank's part of the model and read its weights.  The base is frozen.

    Raises UnknownFamilyError, LayoutError or CheckpointError.
    """
    stages = range(groups.mesh.vpp) if groups.mesh.vpp > 1 else [None]
    with quiet():
        auto_bridge = make_bridge(folder)
        provider = make_provider(auto_bridge, config, groups)
        provider.use_cpu_initialization |= groups.fsdp is not None
        source = open_checkpoint(folder)
        chunks = _chunks(folder, config, groups, provider, stages)
    for chunk, stage in zip(chunks, stages, strict=True):
        chunk.model_type = _model_type()
        chunk.vp_stage = stage
        chunk.requires_grad_(False)
        if groups.fsdp is None:
            chunk.to(groups.device)

    def make_table() -> ParameterTable:
        return ParameterTable(auto_bridge, chunks, groups, source.shapes())

    if config.bridge in CONVERTERS:
        table = make_table()  # the weights are there already
    elif groups.fsdp is None:
        table = make_table()
        load_parameters(table, source)
    else:
        table = load_sharded(make_table, source, chunks, groups)
    if config.recompute or groups.mesh.pp > 1:
        _let_gradients_reach_the_first_layer(chunks[0])
    head = Head(int(provider.vocab_size), groups.tp)
    return Network(folder, config, groups, provider, chunks, table, head)


def _chunks(
    folder: Path, config: ModelConfig, groups: Groups, provider: Any, stages: Sequence[int | None]
) -> list[Any]:
    """Return this rank's chunks: without weights, unless another converter makes them."""
    if config.bridge not in CONVERTERS:
        return [_provide(provider, stage) for stage in stages]
    if groups.fsdp is not None or config.task != "causal_lm":
        raise ConfigError(
            f"bridge={config.bridge!r} is for whole causal language models: fsdp="
            f"{groups.mesh.fsdp}, task={config.task!r}",
            hint="use bridge='megatron-bridge'",
        )
    chunks = CONVERTERS[config.bridge].build(folder, config, groups.mesh)
    if len(chunks) != len(stages):
        raise ConfigError(f"{config.bridge} made {len(chunks)} model chunks, not {len(stages)}")
    return list(chunks)


def _provide(provider: Any, stage: int | None) -> Any:
    try:
        return provider.provide(vp_stage=stage)
    except ImportError as error:
        raise UnknownFamilyError(
            f"this architecture needs a package that is not installed: {error}",
            hint="megatrain doctor says what is missing and the command that mends it",
        ) from error


def _model_type() -> Any:
    from megatron.core.enums import ModelType  # noqa: PLC0415 - patched first

    return ModelType.encoder_or_decoder


def _let_gradients_reach_the_first_layer(chunk: Any) -> None:
    """Make the embedding's output a leaf that wants a gradient.

    The base is frozen, so nothing before the first LoRA factor asks for one: a recomputed layer
    would lose its factors' gradients, and a pipeline stage would have nothing to send back.
    """
    if getattr(chunk, "pre_process", False):
        chunk.embedding.register_forward_hook(
            lambda module, args, out: out.requires_grad_() if torch.is_grad_enabled() else out
        )
