"""`megatrain convert inspect`: every kind of path, as a table and as JSON."""

import argparse
import json

import datasets
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from megatrain.cli.convert import inspect
from megatrain.errors import CheckpointError, DataError
from megatrain.export.state.record import StateRecord, write_record


def parse(*options):
    parser = argparse.ArgumentParser()
    inspect.add_parser(parser.add_subparsers())
    return parser.parse_args(["inspect", *map(str, options)])


@pytest.fixture
def said(capsys):
    """Return what `inspect PATH --json` says."""

    def ask(path, *options):
        args = parse(path, "--json", *options)
        assert args.run(args) == 0
        return json.loads(capsys.readouterr().out)

    return ask


def test_a_checkpoint_is_described(checkpoints, said):
    folder = checkpoints("qwen3_moe")
    found = said(folder, "--tensors")
    assert found["what"] == "Hugging Face checkpoint"
    assert (found["architecture"], found["quantised"]) == ("Qwen3MoeForCausalLM", "no")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["active parameters"] < found["parameters"]
    assert found["dtypes"] == {
        "F32": {"tensors": found["tensors"], "bytes": 4 * found["parameters"]}
    }
    assert found["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    assert {line["name"] for line in found["all_tensors"]} >= {"model.embed_tokens.weight"}
    assert found["largest"]["shape"] == [512, 64]


def test_the_table_names_tensors_and_sizes(checkpoints, capsys):
    args = parse(checkpoints("qwen3"), "--tensors")
    assert args.run(args) == 0
    printed = capsys.readouterr().out
    assert "Qwen3ForCausalLM" in printed
    assert (
        "model.layers.3.mlp.down_proj.weight  F32  64 x 128  32,768  model.safetensors" in printed
    )


def test_an_adapter_is_described(checkpoints, tmp_path, said):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints("qwen3"))
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], rank_pattern={"1.self_attn.q_proj": 2}
    )
    get_peft_model(model, config).save_pretrained(tmp_path)
    found = said(tmp_path)
    assert found["what"] == "PEFT adapter"
    assert (found["rank"], found["alpha"], found["targets"]) == (4, 8, ["q_proj"])
    assert found["rank pattern"] == {"1.self_attn.q_proj": 2}
    assert found["parameters"] == 3 * 4 * (64 + 64) + 2 * (64 + 64)


def test_a_training_state_is_described_and_its_damage_told(tmp_path, said):
    (tmp_path / "state" / "master").mkdir(parents=True)
    save_file({"m.lora_A": torch.ones(4, 8)}, tmp_path / "state/master/1.safetensors")
    values = dict.fromkeys(("saved_at", "seed", "step", "num_calls", "num_passes"), 0)
    values |= {"optimizer": None, "schedule": None, "gradients": None, "tensors": ("master",)}
    values |= {"megatrain": "0", "adapter": "default", "base_model": "x", "layout": "tp2"}
    values |= {"fingerprint": {"model_type": "qwen3"}, "mixed_precision": "no", "version": 1}
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    write_record(
        tmp_path, StateRecord(**values, lora=lora, accumulation_steps=1, consumed_train_samples=5)
    )
    found = said(tmp_path)
    assert found["what"] == "megatrain training state"
    assert (found["layout"], found["parameters"], found["rank"]) == ("tp2", 32, 4)
    (tmp_path / "state/master/1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing: "):
        inspect.run(parse(tmp_path))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_megatron_checkpoint_is_described(tmp_path, said):
    folder = tmp_path / "iter_0000007"
    state = {"w": torch.ones(3, 4, dtype=torch.bfloat16), "optimizer": {"m": torch.ones(3, 4)}}
    dcp.save(state | {"step": 3}, checkpoint_id=str(folder), no_dist=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    found = said(tmp_path)
    assert found["what"] == "Megatron checkpoint (torch_dist)"
    assert (found["iteration"], found["parameters"], found["objects"]) == ("iter_0000007", 12, 1)
    assert found["dtypes"]["bfloat16"] == {"tensors": 1, "bytes": 24}
    assert said(folder)["iteration"] is None
    assert (found["layout"], found["pieces"]) == (None, "up to 1 a tensor")
    (tmp_path / "hugging_face").mkdir()
    conversion = tmp_path / "hugging_face" / "conversion.json"
    conversion.write_text(json.dumps({"layout": {"tp": 2, "pp": 4}, "files": {}}))
    assert said(tmp_path)["layout"] == said(folder)["layout"] == "tp2·pp4"
    conversion.write_text("{}")
    with pytest.raises(CheckpointError, match="cut short or altered"):
        said(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_data_files_are_described(tmp_path, said, suffix):
    rows = datasets.Dataset.from_list([{"text": "a", "n": 1}, {"text": "b", "n": 2}])
    path = tmp_path / f"data.{suffix}"
    match suffix:
        case "jsonl":
            path.write_text('{"text": "a", "n": 1}\n\n{"text": "b", "n": 2}\n')
        case "json":
            path.write_text(json.dumps(rows.to_list()))
        case "csv":
            path.write_text("text,n\na,1\nb,2\n")
        case "parquet":
            rows.to_parquet(path)
        case "arrow":
            rows.save_to_disk(tmp_path / "saved")
            next((tmp_path / "saved").glob("*.arrow")).rename(path)
    found = said(path)
    assert (found["what"], found["rows"], found["format"]) == ("dataset", 2, suffix)
    assert found["columns"] == ["text", "n"]


def test_a_broken_data_file_is_named_with_its_line(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match=r"data\.jsonl: line 2"):
        inspect.run(parse(tmp_path / "data.jsonl"))


def test_what_is_unknown_is_refused_with_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt\nhint: looked for: config\.json"):
        inspect.run(parse(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        inspect.run(parse(tmp_path))
    with pytest.raises(CheckpointError, match="there is nothing at"):
        inspect.run(parse(tmp_path / "none"))
