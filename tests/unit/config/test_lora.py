"""LoraSpec against PEFT: the same fields, the same matches, the same ranks and scales."""

import dataclasses
import subprocess
import sys

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from megatrain.config.lora import LoraSpec
from megatrain.config.peft_fields import IGNORED, REFUSED
from megatrain.errors import ConfigError

NAMES = [
    "lm_head",
    "model.embed_tokens",
    *[
        f"model.layers.{n}.{leaf}"
        for n in (0, 1, 2, 11)
        for leaf in (
            "self_attn.q_proj",
            "self_attn.o_proj",
            "mlp.down_proj",
            "mlp.experts.1.down_proj",
            "mlp.gate",
        )
    ],
    "vision.blocks.1.q_proj",
]


def test_every_field_of_peft_is_supported_ignored_or_refused_at_its_default():
    ours = {each.name for each in dataclasses.fields(LoraSpec)}
    theirs = {each.name for each in dataclasses.fields(LoraConfig)}
    assert theirs == ours | IGNORED | set(REFUSED)
    default = LoraConfig().to_dict()
    assert {name: default[name] for name in REFUSED} == dict(REFUSED)
    same = ours - {"target_modules"}
    assert {n: getattr(LoraSpec(target_modules="x"), n) for n in same} == {
        name: default[name] for name in same
    }


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("layer_replication", [(0, 2)]),
        ("trainable_token_indices", [1]),
        ("ensure_weight_tying", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=option):
        LoraSpec.from_any(LoraConfig(target_modules=["q_proj"], **{option: value}))


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"r": 2.5},
        {"lora_alpha": 0},
        {"lora_alpha": float("nan")},
        {"lora_dropout": 1.0},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"q_proj": -1}},
        {"rank_pattern": {"(": 4}},
        {"target_modules": None},
        {"target_modules": "("},
        {"target_modules": ".*", "layers_to_transform": [0]},
        {"layers_pattern": "layers"},
        {"target_parameters": "mlp.gate.weight"},
        {"init_lora_weights": "eva"},
    ],
)
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(ConfigError):
        LoraSpec(**{"target_modules": ["q_proj"]} | options)


def test_unknown_options_and_other_kinds_are_refused():
    with pytest.raises(ConfigError, match="rnak"):
        LoraSpec.from_any({"target_modules": ["q_proj"], "rnak": 4})
    with pytest.raises(ConfigError, match="LOHA"):
        LoraSpec.from_any({"peft_type": "LOHA", "target_modules": ["q_proj"]})
    with pytest.raises(ConfigError, match="int"):
        LoraSpec.from_any(3)


def test_a_peft_config_and_its_dict_give_the_same_spec():
    config = LoraConfig(
        r=4, lora_alpha=3, target_modules=["v_proj", "q_proj"], alpha_pattern={"q_proj": 7}
    )
    spec = LoraSpec.from_any(config)
    assert spec == LoraSpec.from_any(config.to_dict()) == LoraSpec.from_any(spec)
    assert spec.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.gate"]},
        {"target_modules": r".*\.layers\.1.*proj"},
        {"target_modules": "q_proj"},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [0, 1],
            "layers_pattern": ["layers", "blocks"],
        },
        {"target_modules": ["down_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ],
)
def test_matches_what_peft_matches(options):
    config = LoraConfig(**options)
    spec = LoraSpec.from_any(config)
    assert [name for name in NAMES if spec.matches(name)] == [
        name for name in NAMES if check_target_module_exists(config, name)
    ]


def test_target_parameters_match_the_module_or_expert_that_they_are():
    spec = LoraSpec(
        r=2,
        target_parameters=["mlp.gate.weight", "mlp.experts.down_proj"],
        rank_pattern={"gate.weight": 3, r"experts\.down_proj": 5},
    )
    assert spec.matches("model.layers.0.mlp.gate")
    assert spec.matches("model.layers.0.mlp.experts.7.down_proj")
    assert not spec.matches("model.layers.0.mlp.experts.7.up_proj")
    assert spec.rank_of("model.layers.0.mlp.gate") == 3
    assert spec.rank_of("model.layers.0.mlp.experts.7.down_proj") == 5


def test_a_name_without_an_expert_number_means_every_expert():
    spec = LoraSpec(target_modules=["layers.1.mlp.experts.up_proj"])
    assert spec.matches("model.layers.1.mlp.experts.7.up_proj")
    assert not spec.matches("model.layers.1.mlp.up_proj")
    without = LoraSpec(target_modules=["up_proj"], exclude_modules=["mlp.experts.up_proj"])
    assert not without.matches("model.layers.1.mlp.experts.7.up_proj")
    assert without.matches("model.layers.1.mlp.up_proj")


def test_all_linear_is_left_to_the_model():
    spec = LoraSpec(target_modules="All-Linear", exclude_modules=["lm_head"])
    assert spec.is_all_linear
    assert spec.excludes("lm_head")
    with pytest.raises(ConfigError, match="all-linear"):
        spec.matches("q_proj")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scales_are_those_of_peft(use_rslora):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                [nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "k")}) for _ in range(12)]
            )

    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=use_rslora,
        target_modules=["q", "k"],
        rank_pattern={r"layers\.1\.q": 7, "q": 2, r"layers\.1\d?\.k": 9},
        alpha_pattern={r"1\.k": 11, r"^layers\.2\.k": 6, "k|q": 4},
    )
    spec = LoraSpec.from_any(config)
    for name, module in get_peft_model(Model(), config).named_modules():
        if hasattr(module, "scaling"):
            name = name.removeprefix("base_model.model.")
            assert spec.rank_of(name) == module.r["default"]
            assert spec.scale_of(name) == module.scaling["default"]


def test_peft_reads_what_is_written():
    spec = LoraSpec(r=4, target_modules="all-linear", lora_dropout=0.1, use_rslora=True)
    config = LoraConfig.from_peft_type(**spec.to_peft_dict(target_modules=["a.b", "a.c"]))
    assert config.target_modules == {"a.b", "a.c"}
    assert LoraSpec.from_any(config).lora_dropout == 0.1
    exact = spec.to_peft_dict(target_modules=[], target_parameters=["mlp.gate.weight"])
    assert exact["lora_dropout"] == 0.0  # PEFT refuses dropout on parameters


def test_needs_neither_torch_nor_peft():
    code = (
        "import sys, megatrain.config.lora as m;"
        "m.LoraSpec(target_modules=['q_proj']).matches('x');"
        "assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
