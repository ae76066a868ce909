"""Every layout of so many devices that a model allows, and what it needs; best first.  No torch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatrain.config.estimate import Estimate, ModelShape, Training, estimate
from megatrain.errors import LayoutError
from megatrain.parallel.layout import DeviceMesh


@dataclass(frozen=True, slots=True)
class Cluster:
    """The devices, and what a layout may use of them."""

    device: str
    num_gpus: int
    """Devices in all nodes together."""
    per_node: int
    memory: float
    """Bytes that one device may hold."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout and its estimate."""

    mesh: DeviceMesh
    estimate: Estimate
    fits: bool

    @property
    def seconds_per_token(self) -> float:
        """What layouts are ranked by."""
        speed = self.estimate.tokens_per_second
        assert speed is not None
        return 1.0 / speed


INTERLEAVED = (2, 4)
"""Model chunks per pipeline stage that are tried; more send more messages than they save."""


def divisors(number: int) -> list[int]:
    """Return the divisors in order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def meshes(
    num_gpus: int, per_node: int, num_experts: int, *, splits_experts: bool = True
) -> Iterator[DeviceMesh]:
    """Yield layouts: tp within a node, experts over what tp, cp and dp leave them.

    etp is 1 or, with `splits_experts`, tp; each is tried plain, interleaved, and with fsdp over all
    dp ranks or those of a node.
    """
    for tp in divisors(num_gpus):
        if tp > per_node or per_node % tp:
            continue
        for pp in divisors(num_gpus // tp):
            for cp in divisors(num_gpus // (tp * pp)):
                dp = num_gpus // (tp * pp * cp)
                for etp in {1, tp} if num_experts and splits_experts else {1}:
                    for ep in divisors(tp * cp * dp // etp) if num_experts else [1]:
                        plain = DeviceMesh(tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, etp=etp)
                        yield from _variants(plain, per_node)


def _variants(mesh: DeviceMesh, per_node: int) -> Iterator[DeviceMesh]:
    """Yield a layout as it is, interleaved, and with fsdp where its experts allow it."""
    yield mesh
    if mesh.pp > 1:
        yield from (replace(mesh, vpp=vpp) for vpp in INTERLEAVED)
    if mesh.tp * mesh.cp % (mesh.ep * mesh.etp) == 0:
        in_node = math.gcd(mesh.dp, max(1, per_node // (mesh.tp * mesh.cp)))
        for fsdp in sorted({in_node, mesh.dp} - {1}):
            yield replace(mesh, fsdp=fsdp)


def candidates(config: Mapping[str, Any], training: Training, cluster: Cluster) -> list[Candidate]:
    """Return every layout that the model allows: those that fit first, then by time per token.

    With recomputation where nothing fits without it.  All are compared on the same global batch.
    """
    found = _estimates(config, training, cluster)
    if not any(each.fits for each in found) and not training.recompute:
        again = _estimates(config, replace(training, recompute=True), cluster)
        found = again if any(each.fits for each in again) else found
    key = lambda each: (  # noqa: E731
        not each.fits,
        each.seconds_per_token if each.fits else each.estimate.peak,
        each.mesh.pp,
        each.mesh.tp,
    )
    return sorted(found, key=key)


def _estimates(config: Mapping[str, Any], training: Training, cluster: Cluster) -> list[Candidate]:
    shape = ModelShape.from_config(config)
    count = shape.experts.count if shape.experts else 0
    if training.tokens_per_step is None:
        training = replace(training, tokens_per_step=training.microbatch * cluster.num_gpus)
    result = []
    # The bias of an expert that is split would be added once a rank.
    splits = not shape.traits.expert_bias
    for mesh in meshes(cluster.num_gpus, cluster.per_node, count, splits_experts=splits):
        if mesh.fsdp > 1 and training.trains_all and training.optimizer == "Muon":
            continue  # whole matrices are nowhere under fsdp
        try:
            found = estimate(
                config, mesh, training, device=cluster.device, ranks_per_node=cluster.per_node
            )
        except LayoutError:
            continue
        result.append(Candidate(mesh, found, found.peak <= cluster.memory))
    return result
