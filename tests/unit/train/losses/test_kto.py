"""KTO against TRL's KTOTrainer, in value and gradient, in float64."""

import pytest
import torch

from megatrain.errors import ConfigError
from megatrain.train.losses.kto import KTOLoss
from tests.unit.train.losses import trl
from tests.unit.train.losses.batches import (
    assert_same,
    log_probabilities,
    make_batch,
    padded,
    ragged,
    reference_value_and_gradient,
    report,
    value_and_gradient,
)

LENGTHS = [3, 7, 1, 5, 4]
LABELS = [True, False, False, True, True]
POLICY = log_probabilities(LENGTHS, seed=0)
REFERENCE = [
    [x + d for x, d in zip(*rows, strict=True)]
    for rows in zip(POLICY, ragged(LENGTHS, seed=1, scale=0.4), strict=True)
]
WEIGHTS = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.6}


def make(kl=None, labels=LABELS):
    given = {} if kl is None else {"kl": [kl] * len(LENGTHS)}
    return make_batch(POLICY, ref_logps=REFERENCE, label=[float(x) for x in labels], **given)


@pytest.mark.parametrize("kl", [0.7, 0.0, -0.5])
def test_value_and_gradient_are_trl_s(kl):
    options = {**WEIGHTS, "loss_type": "kto"}
    ref_BT, _ = padded(REFERENCE)
    theirs = reference_value_and_gradient(
        lambda logps: trl.kto(logps, LENGTHS, ref_BT, LABELS, kl, **options)[0], POLICY
    )
    assert_same(value_and_gradient(KTOLoss(**options), make(kl)), theirs)
    if kl >= 0:
        assert_same(value_and_gradient(KTOLoss(**options, kl=kl), make()), theirs)


def test_without_a_reference_point_it_is_trl_s_apo_zero():
    options = {**WEIGHTS, "loss_type": "apo_zero_unpaired"}
    ref_BT, _ = padded(REFERENCE)
    theirs = reference_value_and_gradient(
        lambda logps: trl.kto(logps, LENGTHS, ref_BT, LABELS, 0.0, **options)[0], POLICY
    )
    assert_same(value_and_gradient(KTOLoss(**options), make()), theirs)


@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_kind_is_trl_s(label):
    options, labels = {**WEIGHTS, "loss_type": "kto"}, [label] * len(LENGTHS)
    ref_BT, _ = padded(REFERENCE)
    theirs = reference_value_and_gradient(
        lambda logps: trl.kto(logps, LENGTHS, ref_BT, labels, 0.2, **options)[0], POLICY
    )
    assert_same(value_and_gradient(KTOLoss(**options), make(0.2, labels)), theirs)


def test_statistics_are_trl_s():
    options = {**WEIGHTS, "loss_type": "kto"}
    _, metrics = trl.kto(padded(POLICY)[0], LENGTHS, padded(REFERENCE)[0], LABELS, 0.7, **options)
    found = report(KTOLoss(**options), make(0.7))
    # Statistics are float32 sums.
    assert found == pytest.approx({name: metrics[name] for name in found}, rel=1e-5)


def test_minus_one_is_an_undesirable_label():
    batch = make(0.1, [1 if x else -1 for x in LABELS])
    torch.testing.assert_close(KTOLoss()(batch)[0], KTOLoss()(make(0.1))[0])


def test_a_call_gives_what_is_no_option():
    assert set(KTOLoss().inputs) == {"ref_logps", "label", "kl"}
    assert set(KTOLoss(kl=0.0).inputs) == {"ref_logps", "label"}
    assert set(KTOLoss(loss_type="apo_zero_unpaired").inputs) == {"ref_logps", "label"}
    assert KTOLoss().inputs["label"].kind == KTOLoss().inputs["kl"].kind == "sequence"


def test_the_mean_is_over_data():
    assert KTOLoss().divisor(LENGTHS) == 5
    assert KTOLoss().unit == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta must be above 0"),
        ({"loss_type": "bco"}, "loss_type must be one of"),
        ({"undesirable_weight": -1}, "undesirable_weight must be at least 0"),
        ({"kl": -1}, "kl must be at least 0"),
        ({"kl": 0.5, "loss_type": "apo_zero_unpaired"}, "has no reference point"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        KTOLoss(**options)
