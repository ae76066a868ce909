"""Distillation from the log-probabilities of a teacher's K most probable tokens a label."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatrain.errors import ConfigError, StateError
from megatrain.train.loss import Loss, LossBatch, LossInput, Statistics
from megatrain.train.losses.options import check_choice, check_number
from megatrain.train.losses.sums import measure

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TAILS = ("bucket", "renormalize")
SMALLEST_TAIL = 1e-7
"""What rounding leaves no smaller of a tail's probability."""

_INPUTS: Mapping[str, LossInput] = {
    "teacher_tokens": LossInput(kind="top_k", integer=True),
    "teacher_logps": LossInput(kind="top_k"),
}


def divergence(
    student_NK: Tensor, teacher_NK: Tensor, *, kind: str = "forward_kl", beta: float = 0.5
) -> Tensor:
    """Return (N,) the divergence of two distributions over K outcomes, from log-probabilities.

    forward_kl: KL(teacher, student) (Hinton et al. 2015).  reverse_kl: KL(student, teacher)
    (MiniLLM, 2306.08543).  jsd: beta * KL(teacher, M) + (1 - beta) * KL(student, M), M = beta *
    teacher + (1 - beta) * student: GKD (2306.13649), equation 1.  An outcome that the teacher
    gives -inf is left out.
    """
    possible_NK = teacher_NK > -torch.inf
    student_NK = torch.where(possible_NK, student_NK, 0.0)
    teacher_NK = torch.where(possible_NK, teacher_NK, 0.0)
    if kind == "forward_kl":
        terms_NK = teacher_NK.exp() * (teacher_NK - student_NK)
    elif kind == "reverse_kl":
        terms_NK = student_NK.exp() * (student_NK - teacher_NK)
    else:
        weights = teacher_NK.new_tensor([beta, 1 - beta]).log()
        mixed_NK = torch.logaddexp(teacher_NK + weights[0], student_NK + weights[1])
        terms_NK = beta * teacher_NK.exp() * (teacher_NK - mixed_NK)
        terms_NK = terms_NK + (1 - beta) * student_NK.exp() * (student_NK - mixed_NK)
    return torch.where(possible_NK, terms_NK, 0.0).sum(-1)


def with_tail(logps_NK: Tensor) -> Tensor:
    """Return (N, K + 1): the probability that K tokens leave over, as one more outcome."""
    mass_N1 = logps_NK.logsumexp(-1, keepdim=True).clamp(max=-SMALLEST_TAIL)
    return torch.cat([logps_NK, torch.log(-torch.expm1(mass_N1))], -1)


def distillation(
    student_logps_NK: Tensor,
    teacher_logps_NK: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> Tensor:
    """Return (N,) the divergence of student and teacher, from log p of the teacher's K tokens.

    Both (N, K) are true log-probabilities at temperature 1; a teacher's -inf fills up a label with
    fewer tokens.  tail="bucket": all other tokens are one outcome, so that the divergence is a
    lower bound of the whole one.  "renormalize": the distributions given that the token is one of
    the K; here a `temperature` is exact, since the softmax of log p / T over some tokens is that of
    their logits / T.  No factor T^2.  As TRL's loss_add_tail.
    """
    possible_NK = teacher_logps_NK > -torch.inf
    student_NK = torch.where(possible_NK, student_logps_NK, -torch.inf)
    if tail == "bucket":
        return divergence(with_tail(student_NK), with_tail(teacher_logps_NK), kind=kind, beta=beta)
    student_NK = (student_NK / temperature).log_softmax(-1)
    teacher_NK = (teacher_logps_NK / temperature).log_softmax(-1)
    return divergence(student_NK, teacher_NK, kind=kind, beta=beta)


@dataclass(frozen=True, kw_only=True)
class DistillationLoss(Loss):
    """Divergence from a teacher, the mean over labels.

    Calls give `teacher_tokens` and `teacher_logps`, K numbers a label.
    """

    divergence: str = "forward_kl"
    beta: float | None = None
    """For jsd: between 0 (towards forward KL) and 1 (towards reverse KL); 0.5 if None."""
    tail: str = "bucket"
    """All other tokens are one outcome (bucket), or left out (renormalize)."""
    temperature: float = 1.0
    """Of both softmaxes, for tail="renormalize"."""
    sft_weight: float = 0.0
    """Adds this times -log p of the label itself."""

    inputs: ClassVar = _INPUTS
    statistics: ClassVar = ("divergence", "teacher_top_k_mass")

    def __post_init__(self) -> None:
        """Raise ConfigError where an option is out of range or without effect."""
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_choice("tail", self.tail, TAILS)
        check_number("temperature", self.temperature, above=0)
        check_number("sft_weight", self.sft_weight, at_least=0)
        if self.beta is not None:
            check_number("beta", self.beta, above=0, below=1)
            if self.divergence != "jsd":
                raise ConfigError(f"beta is for divergence='jsd', not {self.divergence!r}")
        if self.temperature != 1 and self.tail != "renormalize":
            raise ConfigError(
                f"temperature {self.temperature} needs tail='renormalize': how a temperature "
                "changes the tail cannot be told from K tokens"
            )

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        if batch.top_logps_NK is None:
            raise StateError("DistillationLoss needs log-probabilities of the teacher's tokens")
        teacher_NK = batch.inputs["teacher_logps"]
        divergence_N = distillation(
            batch.top_logps_NK,
            teacher_NK,
            kind=self.divergence,
            beta=0.5 if self.beta is None else self.beta,
            tail=self.tail,
            temperature=self.temperature,
        )
        # With a weight of 0 the labels' own log-probabilities still belong to the graph.
        loss = divergence_N.sum() - self.sft_weight * batch.logps_N.sum()
        return loss, {
            "divergence": measure(divergence_N),
            "teacher_top_k_mass": measure(teacher_NK.exp().sum(-1)),
        }
