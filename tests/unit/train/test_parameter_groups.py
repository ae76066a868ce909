"""Which options which parameter gets."""

import pytest
import torch

from megatrain.model.tensor_slice import TensorPart, TrainedParameter
from megatrain.train.parameter_groups import GroupKey, GroupOptions

DEFAULTS = {
    "lr": 1e-3,
    "weight_decay": 0.1,
    "adamw_lr": None,
    "adamw_betas": (0.9, 0.99),
    "adamw_eps": 1e-8,
    "adamw_weight_decay": 0.0,
}


def trained(*names, shape=(4, 4), **options):
    parts = tuple(TensorPart(name, shape, None, None, is_expert=False) for name in names)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    return TrainedParameter(parameter, False, True, parts, **options)


MATRIX = trained("model.layers.0.mlp.down_proj.weight")
NORM = trained("model.norm.weight", shape=(4,))
EMBEDDING = trained("model.embed_tokens.weight", place="embedding")
HEAD_B = trained("lm_head.lora_B", place="head", factor="B")
B = trained("model.layers.0.mlp.down_proj.lora_B", factor="B")


def test_all_parameters_share_one_group_by_default():
    options = GroupOptions()
    assert options.keys(muon=False) == [GroupKey()]
    assert {options.key_of(t, muon=False) for t in (MATRIX, NORM, EMBEDDING, B)} == {GroupKey()}
    assert options.overrides(GroupKey(), DEFAULTS) == {}


@pytest.mark.parametrize(
    ("parameter", "rule"),
    [(MATRIX, "muon"), (B, "muon"), (NORM, "adamw"), (EMBEDDING, "adamw"), (HEAD_B, "adamw")],
    ids=["matrix", "factor", "norm", "embedding", "head"],
)
def test_muon_takes_the_matrices_inside_layers(parameter, rule):
    assert GroupOptions().key_of(parameter, muon=True).rule == rule


def test_a_pattern_gives_a_matrix_to_adamw():
    options = GroupOptions(adamw_parameters=[r"down_proj\.weight$"])
    assert options.key_of(MATRIX, muon=True).rule == "adamw"
    assert options.key_of(B, muon=True).rule == "muon"


def test_adamw_beside_muon_has_its_own_options_or_muons():
    overrides = GroupOptions().overrides(GroupKey("adamw"), DEFAULTS)
    assert overrides == {
        "use_muon": False,
        "lr": 1e-3,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.0,
    }


def test_every_key_of_a_parameter_is_among_the_possible_ones():
    options = GroupOptions(no_decay=["norm"], loraplus_lr_ratio=16)
    for muon in (False, True):
        keys = options.keys(muon=muon)
        assert len(set(keys)) == len(keys) == (12 if muon else 6)
        for each in (MATRIX, NORM, EMBEDDING, HEAD_B, B):
            assert options.key_of(each, muon=muon) in keys
