"""Distillation against TRL: top-K of its self-distillation, the whole vocabulary of its GKD."""

from dataclasses import replace

import pytest
import torch

from megatrain.errors import ConfigError, StateError
from megatrain.train.losses.distillation import DistillationLoss, distillation
from tests.unit.train.losses import trl
from tests.unit.train.losses.batches import make_batch, report

LABELS, VOCABULARY, TOP = 6, 11, 4
TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}


def logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LABELS, VOCABULARY, generator=generator, dtype=torch.float64) * 2


TEACHER = logits(1).log_softmax(-1)
TEACHER_TOP, TOKENS = TEACHER.topk(TOP)


def student():
    return logits(0).requires_grad_()


def make(student_NV, tokens=TOKENS, teacher_NK=TEACHER_TOP):
    logps_NV = student_NV.log_softmax(-1)
    batch = make_batch([[-1.0] * 2, [-2.0] * 4])
    return replace(
        batch,
        logps_N=logps_NV[:, 3],
        top_logps_NK=logps_NV.gather(1, tokens),
        inputs={"teacher_tokens": tokens, "teacher_logps": teacher_NK},
    )


def options(kind):
    return {"divergence": kind} | ({"beta": TRL_BETA[kind]} if kind == "jsd" else {})


def compare(loss, make_ours, theirs):
    ours, reference = student(), student()
    value, expected = loss(make_ours(ours))[0], theirs(reference)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-12)
    value.backward()
    expected.backward()
    assert reference.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("kind", TRL_BETA)
def test_k_tokens_of_a_teacher_are_trl_s(kind, tail):
    def theirs(student_NV):
        both = [student_NV.log_softmax(-1).gather(1, TOKENS), TEACHER_TOP]
        if tail == "bucket":
            both = [trl.add_tail_bucket(logps_NK) for logps_NK in both]
        else:
            both = [logps_NK - logps_NK.logsumexp(-1, keepdim=True) for logps_NK in both]
        return trl.compute_divergence(*both, TRL_BETA[kind]).sum()

    compare(DistillationLoss(tail=tail, **options(kind)), make, theirs)


@pytest.mark.parametrize("kind", TRL_BETA)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_tokens_of_a_teacher_are_trl_s_gkd(kind, temperature):
    everything = torch.arange(VOCABULARY).expand(LABELS, -1)

    def theirs(student_NV):
        return trl.GKDTrainer.generalized_jsd_loss(
            student_NV, TEACHER, beta=TRL_BETA[kind], temperature=temperature, reduction="sum"
        )

    loss = DistillationLoss(tail="renormalize", temperature=temperature, **options(kind))
    compare(loss, lambda s: make(s, everything, TEACHER), theirs)


def test_a_bucket_bounds_the_whole_divergence_from_below():
    whole = trl.compute_divergence(student().log_softmax(-1), TEACHER, 0.0)
    parts = distillation(student().log_softmax(-1).gather(1, TOKENS), TEACHER_TOP)
    assert bool((parts <= whole + 1e-12).all())
    assert bool((parts > 0).all())


def test_a_teacher_may_fill_up_with_minus_infinity():
    """As if it had given fewer tokens, for every kind and tail."""
    filled, tokens = TEACHER_TOP.clone(), TOKENS.clone()
    filled[:, -1], tokens[:, -1] = -torch.inf, 0
    for kind in TRL_BETA:
        for tail in ("bucket", "renormalize"):
            loss = DistillationLoss(tail=tail, **options(kind))
            fewer = (TOKENS[:, :-1], TEACHER_TOP[:, :-1])
            compare(
                loss,
                lambda s: make(s, tokens, filled),
                lambda s, loss=loss, fewer=fewer: loss(make(s, *fewer))[0],
            )


def test_a_certain_teacher_leaves_the_bucket_finite():
    certain = torch.full((LABELS, 2), -30.0)
    certain[:, 0] = 0.0
    for kind in TRL_BETA:
        ours = student()
        total, _ = DistillationLoss(**options(kind))(make(ours, TOKENS[:, :2], certain))
        total.backward()
        assert torch.isfinite(total)
        assert torch.isfinite(ours.grad).all()


def test_a_certain_student_leaves_the_bucket_finite():
    for kind in TRL_BETA:
        top_NK = torch.tensor([[0.0, -30.0]] * LABELS, requires_grad=True)
        batch = replace(make(student()), top_logps_NK=top_NK)
        batch.inputs["teacher_logps"] = torch.tensor([[-1.0, -1.0]] * LABELS)
        total, _ = DistillationLoss(**options(kind))(batch)
        (gradient,) = torch.autograd.grad(total, top_NK)
        assert torch.isfinite(total)
        assert torch.isfinite(gradient).all()


def test_labels_themselves_may_count_too():
    ours, reference = student(), student()
    plain, both = (
        DistillationLoss()(make(ours))[0],
        DistillationLoss(sft_weight=0.5)(make(reference))[0],
    )
    expected = plain.detach() - 0.5 * reference.log_softmax(-1)[:, 3].sum().detach()
    torch.testing.assert_close(both.detach(), expected)


def test_statistics_say_what_the_top_k_cover():
    found = report(DistillationLoss(), make(student()))
    assert found["teacher_top_k_mass"] == pytest.approx(float(TEACHER_TOP.exp().sum(1).mean()))
    assert found["divergence"] > 0


def test_a_batch_without_the_teacher_s_tokens_is_refused():
    with pytest.raises(StateError, match="teacher's tokens"):
        DistillationLoss()(make_batch([[-1.0]], teacher_logps=[[[-1.0]]]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"divergence": "jsd", "beta": 1.0}, "beta must be above 0 and below 1"),
        ({"beta": 0.5}, "beta is for divergence='jsd'"),
        ({"tail": "drop"}, "tail must be one of"),
        ({"temperature": 2.0}, "needs tail='renormalize'"),
        ({"tail": "renormalize", "temperature": 0.0}, "temperature must be above 0"),
        ({"sft_weight": -1}, "sft_weight must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        DistillationLoss(**given)
