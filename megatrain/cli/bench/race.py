"""The order of work: both systems start, agree on the numbers, then take turns being measured."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatrain.cli.bench.job import Job
from megatrain.cli.bench.turns import Answer, System, Unit
from megatrain.errors import MegatrainError

Say = Callable[[str], None]

START_TIMEOUT_S = 1800.0
UNIT_TIMEOUT_S = 1800.0

FLOAT32_TOLERANCE = 1e-3
"""Largest difference of a log-probability between the systems."""
BF16_LOSS_TOLERANCE = 0.05
"""Largest difference of the mean loss; single log-probabilities are only reported."""

HOPELESS = 1.5
"""A peer's configuration this many times slower than its best is not measured further..."""
ROUNDS_FOR_ALL = 2
"""...after so many rounds, of which the fastest counts."""


class DisagreementError(MegatrainError, ArithmeticError):
    """The two systems did not compute the same thing, so their times cannot be compared."""


@dataclass
class Entrant:
    """One configuration of one system, and what was measured of it."""

    system: str
    configuration: str
    options: dict[str, Any] = field(default_factory=dict)
    """What a unit of work says besides its phase."""
    forward_like: "Entrant | None" = None
    """Whose forward pass this one's is: checkpointing changes nothing there."""
    check: Answer = field(default_factory=dict)
    forward: list[Answer] = field(default_factory=list)
    train: list[Answer] = field(default_factory=list)
    error: str | None = None

    @property
    def name(self) -> str:
        """System and configuration."""
        return f"{self.system}, {self.configuration}"

    def unit(self, phase: str) -> Unit:
        """Return the unit of work to ask for."""
        return {"phase": phase, "name": self.configuration, **self.options}


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a run found out."""

    entrants: list[Entrant]
    started: dict[str, list[Answer]]
    """What each system's ranks said when they were ready."""
    gemm_flops_per_second: float | None
    agreement: list[dict[str, Any]]


def entrants(*, with_peer: bool) -> list[Entrant]:
    """Return who takes part."""
    result = [Entrant("ours", "packed")]
    if with_peer:
        for batching, padded in (("padded batch", True), ("batch of one", False)):
            plain = Entrant("peer", batching, {"padded": padded, "checkpointing": False})
            options = {"padded": padded, "checkpointing": True}
            again = Entrant("peer", f"{batching}, checkpointing", options, forward_like=plain)
            result += [plain, again]
    return result


class Race:
    """One run."""

    def __init__(self, job: Job, systems: Mapping[str, System], say: Say) -> None:
        self.job, self.systems, self.say = job, systems, say
        self.entrants = entrants(with_peer="peer" in systems)
        self.started: dict[str, list[Answer]] = {}
        self.gemm: list[float] = []

    def run(self) -> Outcome:
        """Measure everybody.  Raises ChildFailedError or DisagreementError."""
        together = self.job.shape.both_fit
        stages = [list(self.systems)] if together else [[name] for name in self.systems]
        for stage in stages:
            with ExitStack() as stack:
                for name in stage:
                    self._start(stack.enter_context(self.systems[name]))
                mine = [each for each in self.entrants if each.system in stage]
                self._measure(mine, stage)
        found = agreement(self.job, self.entrants)
        gemm = max(self.gemm, default=None)
        return Outcome(self.entrants, self.started, gemm, found)

    def _start(self, system: System) -> None:
        self.say(f"{system.name}: loading the model")
        self.started[system.name] = system.start(timeout_s=START_TIMEOUT_S)

    def _measure(self, mine: list[Entrant], stage: list[str]) -> None:
        for each in mine:
            self._ask(each, "check")
        require_agreement(self.job, agreement(self.job, self.entrants))
        self._measure_gemm(stage)
        for repeat in range(self.job.repeats):
            for each in mine:
                if repeat >= ROUNDS_FOR_ALL and is_hopeless(each, mine):
                    continue
                if each.forward_like is None:
                    self._ask(each, "forward")
                self._ask(each, "train")
        self._measure_gemm(stage)

    def _measure_gemm(self, stage: list[str]) -> None:
        """Measure the device with the peer's plain torch, before and after: the best counts."""
        if "peer" not in stage:
            return
        answer = self.systems["peer"].ask({"phase": "gemm"}, timeout_s=UNIT_TIMEOUT_S)[0]
        if "flops_per_second" in answer:
            self.gemm.append(answer["flops_per_second"])
            self.say(f"device: {self.gemm[-1] / 1e9:,.0f} GFLOP/s in a matrix product")

    def _ask(self, entrant: Entrant, phase: str) -> None:
        if entrant.error:
            return
        answers = self.systems[entrant.system].ask(entrant.unit(phase), timeout_s=UNIT_TIMEOUT_S)
        answer = merge_ranks(answers, device=str(self.started["ours"][0]["device"]))
        if "error" in answer:
            entrant.error = str(answer["error"])
            self.say(f"{entrant.name}: {entrant.error}")
            return
        if phase == "check":
            entrant.check = answer
            self.say(f"{entrant.name}: loss {answer['loss']:.6f} (this is the warm-up)")
            return
        (entrant.forward if phase == "forward" else entrant.train).append(answer)
        what = "forward" if phase == "forward" else "forward+backward"
        self.say(f"{entrant.name}: {what} {answer['seconds']:.2f} s")


def merge_ranks(answers: list[Answer], *, device: str) -> Answer:
    """Return one answer: the slowest rank's time; memory added up on a CPU, else the most."""
    merged = dict(answers[0])
    for answer in answers:
        if "error" in answer:
            return answer
    for key in ("seconds", "step_seconds"):
        if key in merged:
            merged[key] = max(answer[key] for answer in answers)
    if "cpu_seconds" in merged:
        merged["cpu_seconds"] = sum(answer["cpu_seconds"] for answer in answers)
    for key in ("bytes", "resident"):
        if key in merged:
            values = [answer[key] for answer in answers]
            merged[key] = sum(values) if device == "cpu" else max(values)
    return merged


def is_hopeless(entrant: Entrant, others: Iterable[Entrant]) -> bool:
    """Tell whether a peer's configuration cannot be its best, forward nor forward and backward."""
    if entrant.system != "peer":
        return False
    peers = [each for each in others if each.system == "peer"]

    def behind(kind: str) -> bool:
        mine = fastest(getattr(entrant, kind))
        best = min(fastest(getattr(each, kind)) for each in peers)
        return mine > HOPELESS * best

    return behind("train") and (entrant.forward_like is not None or behind("forward"))


def fastest(answers: list[Answer]) -> float:
    """Return the least seconds, infinity if nothing was measured."""
    return min((float(answer["seconds"]) for answer in answers), default=math.inf)


def agreement(job: Job, taking_part: list[Entrant]) -> list[dict[str, Any]]:
    """Return how far each of the peer's configurations is from ours."""
    checked = [each for each in taking_part if each.check]
    ours = next((each for each in checked if each.system == "ours"), None)
    if ours is None:
        return []
    return [_difference(job, ours, each) for each in checked if each.system == "peer"]


def _difference(job: Job, ours: Entrant, peer: Entrant) -> dict[str, Any]:
    mine, theirs = (_logps(job, each) for each in (ours, peer))
    # Ours starts with a zero for the first token, which nothing predicts.
    apart = [np.abs(a[1:] - b) for a, b in zip(mine, theirs, strict=True)]
    norm, other = ours.check["grad_norm"], peer.check["grad_norm"]
    return {
        "configuration": peer.configuration,
        "max_logprob_difference": float(max(each.max() for each in apart)),
        "mean_logprob_difference": float(np.concatenate(apart).mean()),
        "loss_difference": abs(ours.check["loss"] - peer.check["loss"]),
        "relative_grad_norm_difference": abs(norm - other) / max(other, 1e-30),
    }


def _logps(job: Job, entrant: Entrant) -> list[np.ndarray[Any, Any]]:
    with np.load(job.folder / entrant.check["logps"]) as file:
        return [file[name] for name in file.files]


def require_agreement(job: Job, differences: list[dict[str, Any]]) -> None:
    """Raise DisagreementError if the systems did not compute the same thing."""
    for each in differences:
        largest, loss = each["max_logprob_difference"], each["loss_difference"]
        if job.dtype == "float32":
            wrong = not (largest <= FLOAT32_TOLERANCE and loss <= FLOAT32_TOLERANCE)
        else:
            wrong = not loss <= BF16_LOSS_TOLERANCE
        if wrong:
            raise DisagreementError(
                f"megatrain and Transformers + PEFT ({each['configuration']}) must compute the "
                f"same in {job.dtype}: largest difference of a log-probability {largest:.2e}, "
                f"of the loss {loss:.2e}",
                hint="their times mean nothing until they do",
            )


def median(answers: list[Answer], key: str = "seconds") -> float | None:
    """Return the median of what was measured, or None if nothing was."""
    return statistics.median(answer[key] for answer in answers) if answers else None
