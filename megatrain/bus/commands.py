"""Everything a rank can be asked, as frozen values.  No torch.

In one process a command may hold any Python object; to travel it must be made of numbers, texts,
lists, dicts and numpy arrays (frames.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatrain.types import AdapterBatch, InputFeature

SHORT_S, PASS_S, FILES_S = 60.0, 600.0, 1800.0
"""Deadlines of what only looks or sets, of a pass or step, and of reading or writing files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Something all ranks do together."""

    mutates: ClassVar[bool] = True
    """Whether ranks that start again must do it again."""
    deadline_s: ClassVar[float] = SHORT_S
    """Seconds it may take on the ranks unless a call says otherwise."""

    model: str = "model"
    """Which of the models that the ranks hold."""
    tag: str = field(default="", compare=False)
    """The caller's own name for this command, by which it finds it again after its own death."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCommand(Command):
    """A command about one adapter."""

    adapter: str | None = None
    """Its name; "" is the base, None the first that is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel(Command):
    """Load a checkpoint; nothing happens if this very model is open."""

    deadline_s: ClassVar[float] = FILES_S
    model_id: str
    options: Mapping[str, Any]
    """Fields of ModelConfig."""
    layout: Mapping[str, int] | None = None
    """Sizes of the mesh that the caller expects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseModel(Command):
    """Forget a model and all that was trained of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddAdapter(AdapterCommand):
    """Inject a LoRA adapter."""

    deadline_s: ClassVar[float] = PASS_S
    adapter: str
    lora: Mapping[str, Any]
    """Fields of LoraSpec."""
    accumulation_steps: int = 1
    seed: int | None = None
    """Decides its initial weights, instead of the ranks' own."""
    optimizer: Sequence[Any] | None = None
    """Kind and options, as SetOptimizer would have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteAdapter(AdapterCommand):
    """Remove an adapter with its optimizer and gradients."""

    adapter: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOptimizer(AdapterCommand):
    """Choose an adapter's optimizer; without adapters, train all parameters."""

    deadline_s: ClassVar[float] = PASS_S
    kind: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSchedule(AdapterCommand):
    """Choose an adapter's learning rate schedule."""

    kind: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLoss(AdapterCommand):
    """Choose what forward_backward minimises."""

    spec: Any
    """A name; in one process also a class or a function."""
    options: Mapping[str, Any]
    trust: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyPatch(Command):
    """Make a named change to the model."""

    spec: Any
    options: Mapping[str, Any]
    trust: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass(AdapterCommand):
    """A command about one adapter and a global batch."""

    deadline_s: ClassVar[float] = PASS_S
    inputs: Sequence[InputFeature]
    loss_inputs: Mapping[str, Any] = field(default_factory=dict)
    micro_batch_size: int | None = None
    prepare: Callable[[Any], Any] | None = None
    """Makes InputFeatures of `inputs`; never sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackward(Pass):
    """Add the gradients of a global batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward(Pass):
    """Return log-probabilities and the loss of a global batch."""

    mutates: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackwardMany(Command):
    """Add the gradients of several adapters' data, in one pass where they can share one."""

    deadline_s: ClassVar[float] = PASS_S
    batches: Sequence[AdapterBatch]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardMany(Command):
    """Return log-probabilities and losses of several adapters' data."""

    mutates: ClassVar[bool] = False
    deadline_s: ClassVar[float] = PASS_S
    batches: Sequence[AdapterBatch]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipGradAndStep(AdapterCommand):
    """Clip, step, zero and move the schedule on every n-th call."""

    deadline_s: ClassVar[float] = PASS_S
    max_grad_norm: float
    options: Mapping[str, Any] | None = None
    """Of the optimizer, from this step on: lr, betas, eps, weight_decay.  With them, a step without
    a pass before it has a gradient of zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipGradNorm(AdapterCommand):
    """Sum gradients over ranks and clip their norm."""

    deadline_s: ClassVar[float] = PASS_S
    max_grad_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(AdapterCommand):
    """Let the optimizer change the adapter."""

    deadline_s: ClassVar[float] = PASS_S


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroGrad(AdapterCommand):
    """Forget the gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LrStep(AdapterCommand):
    """Move the learning rate schedule on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalculateMetric(AdapterCommand):
    """Return metrics since the last time, and start anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeTraining(AdapterCommand):
    """Return one line that says what is trained, and how."""

    mutates: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GetState(AdapterCommand):
    """Return what is trained, or its gradient, whole, by Hugging Face's names."""

    mutates: ClassVar[bool] = False
    deadline_s: ClassVar[float] = FILES_S
    gradients: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Save(AdapterCommand):
    """Write what is trained to a folder that rank 0 sees."""

    mutates: ClassVar[bool] = False
    deadline_s: ClassVar[float] = FILES_S
    directory: str
    save_optimizer: bool = False
    consumed_train_samples: int | None = None
    background: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitForSave(Command):
    """Wait for a save in the background."""

    mutates: ClassVar[bool] = False
    deadline_s: ClassVar[float] = FILES_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(AdapterCommand):
    """Start from an adapter in PEFT's format."""

    deadline_s: ClassVar[float] = FILES_S
    place: str
    optimizer: Sequence[Any] | None = None
    """Kind and options for an adapter that is made; one that is there begins anew with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(AdapterCommand):
    """Go on from a saved training state."""

    deadline_s: ClassVar[float] = FILES_S
    checkpoint: str
    use_previous: bool = False
    with_optimizer: bool = True
    """False: weights alone; steps, moments and gradients begin anew."""
    optimizer: Sequence[Any] | None = None
    """Kind and options where there is no optimizer; without moments in the state, or without
    with_optimizer, it begins anew with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect(Command):
    """Return what the ranks hold: models, adapters, memory, threads."""

    mutates: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping(Command):
    """Do nothing on every rank, together."""

    mutates: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(Command):
    """Record the commands that follow with torch's profiler, into a folder; None ends it."""

    mutates: ClassVar[bool] = False
    directory: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeSnapshot(Command):
    """Write all that the ranks hold, so that ranks which start anew can go on from there."""

    mutates: ClassVar[bool] = False
    deadline_s: ClassVar[float] = FILES_S
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreSnapshot(Command):
    """Become what a snapshot says; without one, forget all models."""

    mutates: ClassVar[bool] = False
    deadline_s: ClassVar[float] = FILES_S
    directory: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(Command):
    """End the ranks, after what they save in the background."""

    mutates: ClassVar[bool] = False
    deadline_s: ClassVar[float] = FILES_S


ModelCommand = (
    AddAdapter
    | DeleteAdapter
    | SetOptimizer
    | SetSchedule
    | SetLoss
    | ApplyPatch
    | ForwardBackward
    | Forward
    | ForwardBackwardMany
    | ForwardMany
    | ClipGradAndStep
    | ClipGradNorm
    | Step
    | ZeroGrad
    | LrStep
    | CalculateMetric
    | DescribeTraining
    | GetState
    | Save
    | WaitForSave
    | Load
    | Resume
)
"""About one open model.  That all are handled is checked by the type checker."""

RankCommand = (
    OpenModel | CloseModel | Inspect | Ping | Profile | TakeSnapshot | RestoreSnapshot | Stop
)
"""About the ranks themselves."""

COMMANDS: dict[str, type[Command]] = {
    kind.__name__: kind for kind in (*ModelCommand.__args__, *RankCommand.__args__)
}
"""By name, as they are called on the wire."""


def is_redone(command: Command) -> bool:
    """Tell whether ranks that start anew must be told it again."""
    return command.mutates or (isinstance(command, Save) and command.background)
