"""Time of one step from arithmetic and traffic.  Rough: to compare layouts, not to promise.

Arithmetic runs at a fixed share of a device's peak, messages at a fixed share of a link's, and
nothing overlaps.  What is left out is the same for all layouts of a model: data, kernels' launches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatrain.config.estimate.linears import Mesh
from megatrain.config.estimate.memory import RankMemory
from megatrain.config.estimate.model import ModelShape
from megatrain.config.estimate.training import Training
from megatrain.config.estimate.work import Work
from megatrain.errors import ConfigError

EFFICIENCY = 0.5
"""Share of a device's peak that matrix products of a training step reach."""

LINK_EFFICIENCY = 0.7
"""Share of a link's bandwidth that collectives reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator: makers' figures, dense, without sparsity."""

    flops: Mapping[str, float]
    """FLOPs per second by precision."""
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes per second between memory and arithmetic."""
    local_link: float
    """Bytes per second and direction to the others in a node."""
    remote_link: float
    """Bytes per second and direction to other nodes."""
    overhead: int
    """Bytes of context, communication buffers and libraries, which no tensor shows."""


def _gpu(half: float, single: float, gigabytes: int, *, bandwidth: float, local: float) -> Device:
    return Device(
        flops={"bf16": half, "fp16": half, "no": single},
        memory=gigabytes * 10**9,
        bandwidth=bandwidth,
        local_link=local,
        remote_link=50e9,
        overhead=2 * 10**9,
    )


DEVICES: Mapping[str, Device] = {
    "a100": _gpu(312e12, 19.5e12, 80, bandwidth=2.0e12, local=300e9),
    "h100": _gpu(989e12, 67e12, 80, bandwidth=3.35e12, local=450e9),
    "h200": _gpu(989e12, 67e12, 141, bandwidth=4.8e12, local=450e9),
    "b200": _gpu(2250e12, 80e12, 180, bandwidth=8.0e12, local=900e9),
    "cpu": Device(
        flops={"bf16": 50e9, "fp16": 50e9, "no": 50e9},
        memory=16 * 10**9,
        bandwidth=10e9,
        local_link=2e9,
        remote_link=1e9,
        overhead=5 * 10**8,
    ),
}
"""By name.  `cpu` is one core, whose memory is what you make it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step: forward and backward over the global batch, and the optimizer."""

    compute: float
    """Matrix products, with what recomputation does again."""
    bubble: float
    """Stages that wait for each other."""
    communication: float
    """Tensor, expert, context and pipeline parallel messages."""
    gradients: float
    """Sum of gradients over data parallel ranks, and new weights back."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.bubble + self.communication + self.gradients


def find_device(name: str) -> Device:
    """Return a device by name.  Raises ConfigError."""
    if name not in DEVICES:
        raise ConfigError(f"unknown device {name!r}; known: {', '.join(DEVICES)}")
    return DEVICES[name]


def step_tokens(mesh: Mesh, training: Training) -> int:
    """Return the tokens of a global batch."""
    return training.tokens_per_step or training.microbatch * mesh.dp * mesh.pp


def step_time(
    shape: ModelShape,
    mesh: Mesh,
    training: Training,
    device: Device,
    ranks: list[RankMemory],
    ranks_per_node: int,
) -> StepTime:
    """Estimate one step on ranks that fill nodes one after the other, tp first, then cp, dp, pp."""
    tokens = step_tokens(mesh, training)
    batches = max(1.0, tokens / (training.microbatch * mesh.dp))
    lengths = [training.sequence_length] * max(1, round(tokens / training.sequence_length))
    work = Work.of_shape(shape)
    flops = work.train_flops(lengths, is_frozen=training.lora is not None)
    if training.recompute:
        flops += work.forward_flops(lengths)
    rate = device.flops[training.precision] * EFFICIENCY
    compute = flops / (rate * mesh.dp * mesh.cp * mesh.tp * mesh.pp)
    # Every micro-batch reads the weights, forward and backward: few tokens do not fill the device.
    reads = 3 if training.trains_all or training.recompute else 2
    weights = max(rank.weights for rank in ranks)
    compute = max(compute, batches * reads * weights / device.bandwidth)
    bubble = compute * (mesh.pp - 1) / (batches * mesh.vpp)

    def link(width: int) -> float:
        """Return the bandwidth of a group whose members lie within `width` ranks."""
        local = width <= ranks_per_node
        return (device.local_link if local else device.remote_link) * LINK_EFFICIENCY

    traffic = _layer_traffic(shape, mesh, training, link) * shape.layers / mesh.pp
    width = mesh.tp * mesh.cp * mesh.dp
    states = training.microbatch / mesh.cp / mesh.tp * shape.hidden * training.bytes
    # Interleaving sends a micro-batch through every rank once for each of its chunks.
    stages = 2 * mesh.vpp * states / link(width * mesh.pp) if mesh.pp > 1 else 0.0
    sharded = getattr(mesh, "fsdp", 1)
    stages += _gathering(training, sharded, ranks) / link(mesh.tp * mesh.cp * sharded)
    most = max(rank.gradients for rank in ranks)
    sharing = mesh.dp * mesh.cp // sharded
    gradients = 2 * most * (sharing - 1) / sharing / link(width) if sharing > 1 else 0.0
    return StepTime(
        compute=compute,
        bubble=bubble,
        communication=batches * (traffic + stages),
        gradients=gradients,
    )


def _gathering(training: Training, sharded: int, ranks: list[RankMemory]) -> float:
    """Return the bytes that fsdp moves for a micro-batch: weights twice, and their gradients."""
    entries = max(sum(rank.parameters.values()) for rank in ranks)
    each = 2 * training.bytes + (4 if training.trains_all else 0)
    return entries * each * (sharded - 1) / sharded


def _layer_traffic(
    shape: ModelShape, mesh: Mesh, training: Training, link: Callable[[int], float]
) -> float:
    """Return seconds of one layer's messages for a micro-batch, forward and backward."""
    tokens = training.microbatch / mesh.cp
    whole = tokens * shape.hidden * training.bytes
    seconds = 0.0
    if mesh.tp > 1:
        # All-gather and reduce-scatter around attention and around the MLP, both ways.
        seconds += 8 * whole * (mesh.tp - 1) / mesh.tp / link(mesh.tp)
    if mesh.cp > 1:
        kv = 2 * tokens * shape.groups * shape.head_dim / mesh.tp * training.bytes
        seconds += 3 * kv * (mesh.cp - 1) / link(mesh.tp * mesh.cp)
    if shape.experts is not None:
        routed = whole / mesh.tp * shape.experts.per_token
        if mesh.ep > 1:
            seconds += 4 * routed * (mesh.ep - 1) / mesh.ep / link(mesh.ep * mesh.etp)
        if mesh.etp > 1:
            # Each of an expert's ranks gathers what was sent to the others, and sums come back.
            seconds += 4 * routed * (mesh.etp - 1) / link(mesh.etp)
    return seconds
