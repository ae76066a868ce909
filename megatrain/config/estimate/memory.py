"""Bytes that one rank holds: weights, gradients, optimizer, activations, the head's logits."""

from dataclasses import asdict, dataclass

from megatrain.config.estimate.activations import (
    head_kept,
    head_workspace,
    layer_activations,
)
from megatrain.config.estimate.linears import Linear, Mesh, is_target, stage_layers, stage_linears
from megatrain.config.estimate.model import ModelShape
from megatrain.config.estimate.training import MOMENTS, Training


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """One rank of a pipeline stage; the other ranks of the stage hold as much."""

    stage: int
    parameters: dict[str, int]
    """Entries by kind: embedding, head, attention, mlp, router, experts, norm."""
    trained: int
    """Entries that are trained."""
    weights: int
    """Bytes of parameters and factors."""
    gradients: int
    """Bytes of the float32 sums."""
    optimizer: int
    """Bytes of this rank's share of float32 masters and moments; 0 where they are offloaded."""
    host: int = 0
    """Bytes of host memory: what an offloaded optimizer keeps there, and its gradients."""
    activations: int
    """Bytes that autograd keeps, of all micro-batches in flight."""
    workspace: int
    """Bytes that come and go in backward: the head's logits or the widest layer's gradients."""
    step_workspace: int
    """Bytes that come and go in the optimizer step, when there are no activations."""
    overhead: int
    """Bytes of the runtime: context, communication buffers."""

    @property
    def peak(self) -> int:
        """The most bytes at one time."""
        held = self.weights + self.gradients + self.optimizer + self.overhead
        return held + max(self.activations + self.workspace, self.step_workspace)

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        return asdict(self) | {"peak": self.peak}


def rank_memory(
    shape: ModelShape, mesh: Mesh, training: Training, *, stage: int, overhead: int
) -> RankMemory:
    """Count one rank of a stage."""
    linears = list(stage_linears(shape, mesh, stage))
    kinds: dict[str, int] = {}
    for linear in linears:
        kinds[linear.kind] = kinds.get(linear.kind, 0) + linear.local(mesh)
    dense, experts = trained_entries(linears, mesh, training)
    weights = sum(kinds.values()) * training.bytes
    gradients = optimizer = step = host = 0
    if training.optimizer is not None:
        if training.lora is not None:
            weights += (dense + experts) * training.bytes
        share = dense / (mesh.dp * mesh.cp)
        share += experts / (mesh.dp * mesh.cp * mesh.tp / (mesh.ep * mesh.etp))
        gradients = 4 * (dense + experts)
        optimizer = round(share * 4 * (1 + MOMENTS[training.optimizer]))
        if mesh.dp * mesh.cp > 1:
            # The reduced gradient, and the new weights of all ranks before they are copied.
            step = round(4 * share) + gradients
        if training.offload_optimizer:
            host, optimizer = optimizer + round(4 * share), 0
    sharded = getattr(mesh, "fsdp", 1)
    if sharded > 1:
        weights = weights // sharded + _gathered(linears, mesh, training)
        gradients //= sharded
    activations, workspace = _activations(shape, mesh, training, linears, stage)
    return RankMemory(
        stage=stage,
        parameters=kinds,
        trained=dense + experts,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        host=host,
        activations=activations,
        workspace=workspace,
        step_workspace=step,
        overhead=overhead,
    )


def trained_entries(linears: list[Linear], mesh: Mesh, training: Training) -> tuple[int, int]:
    """Return the dense and the experts' entries that a rank trains."""
    if training.optimizer is None:
        return 0, 0
    counts = [0, 0]
    for linear in linears:
        if training.lora is None:
            counts[linear.is_expert] += linear.local(mesh)
        elif is_target(linear, training.lora):
            counts[linear.is_expert] += linear.factors(training.lora, mesh)
    return counts[0], counts[1]


def _gathered(linears: list[Linear], mesh: Mesh, training: Training) -> int:
    """Return the bytes of two whole layers, the one at work and the next, that fsdp gathers."""
    layers: dict[str, int] = {}
    for linear in linears:
        name = ".".join(linear.module.split(".")[:3])
        layers[name] = layers.get(name, 0) + linear.local(mesh)
    return 2 * max(layers.values()) * training.bytes


def in_flight(mesh: Mesh, stage: int) -> float:
    """Return how many micro-batches a stage keeps activations of, under 1F1B or interleaving.

    Source: Narayanan et al., arXiv:2104.04473, section 2.2.
    """
    if mesh.vpp > 1:
        return min(1 + (mesh.pp - 1) / mesh.pp / mesh.vpp, 2.0) * mesh.pp
    return float(mesh.pp - stage)


def _activations(
    shape: ModelShape, mesh: Mesh, training: Training, linears: list[Linear], stage: int
) -> tuple[int, int]:
    layers = [layer_activations(shape, mesh, training, i) for i in stage_layers(shape, mesh, stage)]
    widest = max(layers, key=lambda layer: layer.workspace + layer.kept)
    is_last = stage == mesh.pp - 1
    head = 4 * head_workspace(shape, mesh, training) if is_last else 0.0
    if training.optimizer is None:
        return 0, round(max(widest.kept * training.bytes, head))
    per_batch = sum(layer.input if training.recompute else layer.kept for layer in layers)
    again = widest.kept if training.recompute else 0.0
    kept = per_batch * in_flight(mesh, stage)
    if is_last:
        kept += head_kept(shape, mesh, training)
    workspace = (widest.workspace + again) * training.bytes
    if training.trains_all:
        # Of the largest weight: the head's is a sum over chunks, so there are two of it.
        largest = max(each.local(mesh) // each.local_size(mesh)[2] for each in linears)
        workspace += largest * training.bytes
        head += 2 * largest * training.bytes if is_last else 0
    return round(kept * training.bytes), round(max(workspace, head))
