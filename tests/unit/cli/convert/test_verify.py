"""`megatrain convert verify` on files: the same bytes, and every kind of difference by its name."""

import argparse
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.cli.convert import verify
from megatrain.errors import CheckpointError, ConfigError
from megatrain.export.state.record import StateRecord, write_record

NAME = "model.layers.1.mlp.down_proj.weight"


def parse(*options):
    parser = argparse.ArgumentParser()
    verify.add_parser(parser.add_subparsers())
    return parser.parse_args(["verify", *map(str, options)])


@pytest.fixture
def compare(capsys):
    """Return the exit status and the report of `verify ... --json`."""

    def ask(*options):
        args = parse(*options, "--json")
        status = args.run(args)
        return status, json.loads(capsys.readouterr().out)

    return ask


@pytest.fixture
def pair(checkpoints, tmp_path):
    """A checkpoint and a function that writes a copy with changed tensors."""
    folder = checkpoints("qwen3")

    def changed(change):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors")
        return copy

    return folder, changed


def test_a_copy_is_the_same_and_has_checksums(pair, compare, tmp_path):
    folder, changed = pair
    copy = changed(lambda tensors: None)
    status, found = compare(folder, copy, "--report", tmp_path / "report.json")
    assert (status, found["same"]) == (0, True)
    assert found["num_compared"] == len(found["checksums"]) == 47
    assert len({a for a, _ in found["checksums"].values()}) == 47
    assert json.loads((tmp_path / "report.json").read_text()) == found


def test_shards_and_one_file_are_the_same(pair, compare, tmp_path):
    import transformers

    folder, _ = pair
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert compare(folder, tmp_path / "shards")[0] == 0


def test_each_kind_of_difference_is_named(pair, compare):
    folder, changed = pair

    def change(tensors):
        tensors["extra"] = tensors.pop("model.norm.weight")
        tensors[NAME] = tensors[NAME].clone()
        tensors[NAME][3, 5] += 0.5
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()

    status, found = compare(folder, changed(change))
    assert status == 1
    assert (found["only_in_a"], found["only_in_b"]) == (["model.norm.weight"], ["extra"])
    assert found["shapes"] == {"model.embed_tokens.weight": [[512, 64], [511, 64]]}
    assert found["dtypes"] == {"lm_head.weight": ["F32", "BF16"]}
    assert list(found["values"]) == [NAME]
    assert found["checksums"][NAME][0] != found["checksums"][NAME][1]


def test_the_lines_name_what_differs(pair, capsys):
    folder, changed = pair
    copy = changed(lambda tensors: tensors[NAME].zero_())
    args = parse(folder, copy)
    assert args.run(args) == 1
    printed = capsys.readouterr().out
    assert f"other values: 1\n  {NAME} (checksum " in printed
    assert printed.endswith("they differ: 47 tensors compared\n")


def test_a_tolerance_compares_values(pair, compare):
    folder, changed = pair
    largest = float(load_file(folder / "model.safetensors")[NAME].abs().max())

    def change(tensors):
        tensors[NAME][0, 0] += 1e-3 * largest
        tensors["lm_head.weight"] = tensors["lm_head.weight"].double()

    copy = changed(change)
    status, found = compare(folder, copy, "--tolerance", "1e-2")
    assert (status, found["dtypes"]) == (0, {"lm_head.weight": ["F32", "F64"]})
    assert found["largest"]["relative"] == pytest.approx(1e-3, rel=1e-2)
    status, found = compare(folder, copy, "--tolerance", "1e-4")
    assert (status, list(found["values"])) == (1, [NAME])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_a_difference_under_any_tolerance(pair, compare, value):
    folder, changed = pair

    def change(tensors):
        tensors[NAME][0, 0] = value

    copy = changed(change)
    assert compare(folder, copy, "--tolerance", "1e9")[0] == 1
    assert compare(copy, copy, "--tolerance", "0")[0] == 0


def write_state(folder, tensors, lora):
    (folder / "state" / "master").mkdir(parents=True)
    save_file(tensors, folder / "state/master/1.safetensors")
    values = dict.fromkeys(("saved_at", "seed", "step", "num_calls", "num_passes"), 0)
    values |= {"optimizer": None, "schedule": None, "gradients": None, "tensors": ("master",)}
    values |= {"megatrain": "0", "adapter": "default", "base_model": "x", "layout": "tp2"}
    values |= {"fingerprint": {"model_type": "qwen3"}, "mixed_precision": "bf16", "version": 1}
    values |= {"accumulation_steps": 1, "consumed_train_samples": None}
    write_record(folder, StateRecord(**values, lora=lora))
    return folder


def test_a_state_is_compared_after_rounding_its_masters(checkpoints, tmp_path, compare):
    masters = load_file(checkpoints("qwen3") / "model.safetensors")
    state = write_state(tmp_path / "state", masters, None)
    folder = tmp_path / "saved"
    shutil.copytree(checkpoints("qwen3"), folder)
    saved = {name: tensor.bfloat16() for name, tensor in masters.items()}
    save_file(saved, folder / "model.safetensors")
    assert compare(folder, state)[0] == 0
    assert compare(state, folder)[0] == 0
    saved[NAME][2, 2] *= 1.01
    save_file(saved, folder / "model.safetensors")
    status, found = compare(folder, state)
    assert (status, list(found["values"])) == (1, [NAME])


def test_an_adapter_is_compared_with_another_and_with_a_state(tmp_path, compare):
    module = "model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A": torch.randn(4, 8), f"{module}.lora_B": torch.randn(6, 4)}
    config = {"r": 4, "lora_alpha": 8, "target_modules": [module], "peft_type": "LORA"}
    for name, alpha in (("one", 8), ("other", 16)):
        (tmp_path / name).mkdir()
        keys = {f"base_model.model.{name}.weight": each for name, each in factors.items()}
        save_file(keys, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps(config | {"lora_alpha": alpha})
        )
    state = write_state(tmp_path / "state", factors, config | {"target_modules": "all-linear"})
    assert compare(tmp_path / "one", state)[0] == 0
    assert compare(tmp_path / "one", tmp_path / "one")[0] == 0
    status, found = compare(tmp_path / "one", tmp_path / "other")
    assert (status, found["options"], found["values"]) == (1, {"lora_alpha": [8, 16]}, {})


def test_an_adapter_beside_a_model_is_refused(checkpoints, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="an adapter has other tensors than a model"):
        verify.run(parse(checkpoints("qwen3"), tmp_path))


def test_damage_is_told(pair, checkpoints):
    folder, changed = pair
    copy = changed(lambda tensors: None)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cut short"):
        verify.run(parse(folder, copy))
    with pytest.raises(CheckpointError, match="there is nothing at"):
        verify.run(parse(folder, copy / "none"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--tp", "2"], "no effect on files"),
        (["--adapter", "x"], "no effect on files"),
        (["--layers", "--tp", "2"], "no effect without --with megatrain"),
        (["--tolerance", "-1"], "0 or more"),
        (["--tolerance", "nan"], "0 or more"),
    ],
)
def test_options_without_effect_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        verify.run(parse("a", "b", *options))
