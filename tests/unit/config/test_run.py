"""RunConfig: TOML and overrides in, one checked value out; every mistake is named."""

import subprocess
import sys
from dataclasses import fields

import pytest
from pydantic import BaseModel

from megatrain.config.run import RunConfig, parse, read
from megatrain.config.run.sections import MeshSection, Named
from megatrain.errors import ConfigError
from megatrain.parallel.layout import DeviceMesh

SMALLEST = {
    "recipe": "sft",
    "model": {"id": "base"},
    "data": {"train": [{"dataset_id": "rows.jsonl"}]},
}


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return a model and all models in its fields."""
    found = [model]
    for field in model.model_fields.values():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += sections(kind)
    return found


def test_the_smallest_configuration_trains_lora_on_all_linear_layers_of_one_rank():
    config = parse(SMALLEST)
    assert config.lora_spec is not None
    assert config.lora_spec.is_all_linear
    assert config.num_ranks == 1
    assert config.optimizer.options == {"lr": 1e-4}


def test_a_file_is_read_and_overrides_win(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'recipe = "dpo"\noptimizer = "SGD"\n[model]\nid = "base"\n'
        '[[data.train]]\ndataset_id = "a.jsonl"\n[train]\nbatch_size = 4\n'
    )
    config = read(
        file,
        [
            "train.batch_size=16",
            "optimizer.lr=3e-4",
            "optimizer.momentum=0.9",
            "model.id=hf://owner/model",
            "data.train.0.weight=2",
            'data.train.0.preprocessor={ name = "AlpacaProcessor", system = "Be brief." }',
            "lora.target_modules=['q_proj']",
            "mesh.tp=2",
        ],
    )
    assert config.train.batch_size == 16
    assert config.optimizer.name == "SGD"
    assert config.optimizer.options == {"lr": 3e-4, "momentum": 0.9}
    assert config.model.id == "hf://owner/model"
    assert config.data.train[0].weight == 2
    assert config.data.train[0].preprocessor.options == {"system": "Be brief."}
    assert config.lora_spec.target_modules == ("q_proj",)
    assert config.num_ranks == 2


def test_what_ranks_read_is_what_the_command_checked():
    options = ["lora.r=4", "loss.beta=0.3", "data.template.loss_on=last", "mesh.fsdp=2"]
    options += ["model_patches=[{ name = 'a.b:C', factor = 2 }]", "data.on_error=skip"]
    config = parse(SMALLEST, options)
    text = config.model_dump(mode="json", exclude_none=True)
    assert parse(text) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.bach_size=4", "unknown key 'bach_size' in [train]; did you mean 'batch_size'?"),
        ("modell.id=x", "unknown key 'modell' in the top level; did you mean 'model'?"),
        ("data.train.0.weigth=1", "'weigth' in [data.train.0]; did you mean 'weight'?"),
        ("data.packin=true", "'packin' in [data]; did you mean 'packing'?"),
        ("lora.lora_alfa=4", "unknown key 'lora_alfa' in [lora]; did you mean 'lora_alpha'?"),
        ("model.mixed_precison=no", "'mixed_precison' in [model]; did you mean 'mixed_precision'?"),
        ("mesh.sp=2", "unknown key 'sp' in [mesh]"),
        ("schedule.warmup_ratoi=0.1", "'warmup_ratoi' in [schedule]; did you mean 'warmup_ratio'?"),
    ],
)
def test_an_unknown_key_is_named_with_its_section_and_the_nearest_one(override, message):
    with pytest.raises(ConfigError) as caught:
        parse(SMALLEST, [override])
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_size=0"], "train.batch_size"),
        (["recipe=ppo"], "'pt', 'sft', 'dpo', 'kto', 'rm' or 'distill'"),
        (["data.train=[]"], "data.train must name at least one source"),
        (["full=true", "lora.r=4"], "full = true"),
        (["recipe=dpo", "data.packing=true"], "packing is for pt and sft: recipe='dpo'"),
        (["data.streaming=true"], "train.max_steps"),
        (["data.packing=true", "data.streaming=true", "train.max_steps=1"], "packing"),
        (["train.eval_every=2"], "train.eval_every needs evaluation data"),
        (["train.early_stop=2"], "train.early_stop needs evaluation data"),
        (["train.keep=2"], "keep needs save_every"),
        (["train.skip_damaged=true"], "skip_damaged needs resume"),
        (["train.resume=auto", "train.overwrite=true"], "overwrite deletes"),
        (["model.task=reward"], "the recipe"),
        (["data.train.0.data_slice=[1]"], "data.train.0.data_slice"),
        (
            ["data.train=[{dataset_id='a', weight=1}, {dataset_id='b'}]"],
            "weights must be given for all training sources or none",
        ),
        (["lora.r=0"], "lora: r must be a whole number"),
        (["data.on_error=ignore"], "data.on_error"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigError) as caught:
        parse(SMALLEST, overrides)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size", "--set takes key=value"),
        ("data.train.3.weight=1", "'3' is not an index of a list of 1"),
        ("train.epochs.x=1", "train.epochs is not a table: 3"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(override, message):
    with pytest.raises(ConfigError, match="--set") as caught:
        parse(SMALLEST, ["train.epochs=3", override])
    assert message in caught.value.message


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("recipe = \n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not TOML.*line 1"):
        read(broken)


def test_every_option_says_what_it_is():
    silent = [
        f"{model.__name__}.{name}"
        for model in sections(RunConfig)
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert silent == []


def test_every_section_refuses_unknown_keys_but_those_with_options_of_a_plug_in():
    open_models = {m for m in sections(RunConfig) if m.model_config.get("extra") != "forbid"}
    assert all(issubclass(model, Named) for model in open_models)


def test_the_mesh_has_the_axes_of_device_mesh():
    assert set(MeshSection.model_fields) == {field.name for field in fields(DeviceMesh)}


def test_reading_a_configuration_imports_no_torch():
    code = "import sys, megatrain.config.run; print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"
