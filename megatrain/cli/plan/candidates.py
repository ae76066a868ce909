"""Every layout of so many devices that a model allows, and what it needs; best first.  No torch."""

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


def divisors(number: int) -> list[int]:
    """Return the divisors in order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def meshes(num_gpus: int, per_node: int, num_experts: int) -> Iterator[DeviceMesh]:
    """Yield layouts: tp within a node, ep over what tp, cp and dp leave it, etp always 1."""
    for tp in divisors(num_gpus):
        if tp > per_node or per_node % tp:
            continue
        for pp in divisors(num_gpus // tp):
            for cp in divisors(num_gpus // (tp * pp)):
                dp = num_gpus // (tp * pp * cp)
                for ep in divisors(tp * cp * dp) if num_experts else [1]:
                    yield DeviceMesh(tp=tp, pp=pp, cp=cp, dp=dp, ep=ep)


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
    for mesh in meshes(cluster.num_gpus, cluster.per_node, count):
        try:
            found = estimate(
                config, mesh, training, device=cluster.device, ranks_per_node=cluster.per_node
            )
        except LayoutError:
            continue
        result.append(Candidate(mesh, found, found.peak <= cluster.memory))
    return result
