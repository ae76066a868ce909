"""Merging against PEFT's merge_and_unload, and what goes wrong on the way."""

import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.errors import CheckpointError, ExportError
from megatrain.export.adapters import merge as merge_module
from megatrain.export.adapters.base import open_base
from megatrain.export.adapters.merge import merge, plan_merge, verify_merge
from megatrain.export.peft_adapter import WEIGHTS
from tests.fixtures import quantized_files
from tests.unit.export.adapters.made import (
    CASES,
    DENSE,
    base_model,
    logits,
    merged_by_peft,
    peft_adapter,
    same_bytes,
    tensors_in,
    ulps,
)


def run(base, adapter, out, **options):
    plan = plan_merge(base, adapter)
    result = merge(plan, out, lambda _: None, **options)
    assert verify_merge(plan, out, lambda _: None) == result["tensors"]
    return result


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES.keys())
@pytest.mark.slow
def test_a_float32_merge_is_pefts_within_one_ulp(family, options, checkpoints, tmp_path):
    folder = checkpoints(family)
    model = peft_adapter(folder, tmp_path / "peft", options)
    run(folder, tmp_path / "peft", tmp_path / "out")
    theirs, ours = merged_by_peft(model, tmp_path / "theirs"), tensors_in(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    assert max(ulps(ours[name], value) for name, value in theirs.items()) <= 1
    before = tensors_in(folder)
    assert any(not torch.equal(before[name], value) for name, value in ours.items())
    assert (tmp_path / "out" / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize("case", ["dense", "fused experts", "gpt-oss", "embedding and head"])
@pytest.mark.slow
def test_a_bf16_merge_is_float32_arithmetic_rounded_once(case, checkpoints, tmp_path):
    family, options = CASES[case]
    folder = checkpoints(family)
    base_model(folder, torch.bfloat16).save_pretrained(tmp_path / "base")
    base_model(tmp_path / "base", torch.float32).save_pretrained(tmp_path / "wide")
    model = peft_adapter(tmp_path / "wide", tmp_path / "peft", options)
    run(tmp_path / "base", tmp_path / "peft", tmp_path / "out")
    theirs, ours = merged_by_peft(model, tmp_path / "theirs"), tensors_in(tmp_path / "out")
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    assert max(ulps(ours[name], value.bfloat16()) for name, value in theirs.items()) <= 1


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_head_is_written_apart_so_that_the_merge_computes_what_the_adapter_did(
    target, checkpoints, tmp_path
):
    """PEFT's own merge adds to both at once, and computes something else."""
    folder = checkpoints("qwen3_tied")
    model = peft_adapter(folder, tmp_path / "peft", {"target_modules": ["q_proj", target]})
    expected = logits(model)
    assert run(folder, tmp_path / "peft", tmp_path / "out")["untied"]
    merged = base_model(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert not merged.config.tie_word_embeddings
    assert "lm_head.weight" in tensors_in(tmp_path / "out")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_head_that_the_base_stores_too_is_not_tied_by_the_merged_config(
    target, checkpoints, tmp_path
):
    folder = shutil.copytree(checkpoints("qwen3_tied"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = peft_adapter(folder, tmp_path / "peft", {"target_modules": ["q_proj", target]})
    expected = logits(model)
    assert run(folder, tmp_path / "peft", tmp_path / "out")["untied"]
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    merged = base_model(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert not merged.config.tie_word_embeddings


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of half a megabyte, if this system lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def sharded(folder, path):
    base_model(folder).save_pretrained(path, max_shard_size="200KB")
    (path / "tokenizer.json").write_text("{}")
    return path


def test_shards_index_and_tokenizer_are_as_in_the_base(checkpoints, tmp_path):
    base = sharded(checkpoints("qwen3"), tmp_path / "base")
    peft_adapter(base, tmp_path / "peft", DENSE)
    result = run(base, tmp_path / "peft", tmp_path / "out")
    names = {path.name for path in base.iterdir()}
    assert result["files"] > 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    indices = [
        json.loads((each / "model.safetensors.index.json").read_text())
        for each in (base, tmp_path / "out")
    ]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    for path in base.glob("*.safetensors"):
        assert load_file(path).keys() == load_file(tmp_path / "out" / path.name).keys()


KILLED = """
import os, signal, sys
from pathlib import Path
from megatrain.export.adapters import merge as module
base, adapter, out = map(Path, sys.argv[1:])
plan, seen = module.plan_merge(base, adapter), []
def progress(num_bytes):
    seen.append(num_bytes)
    if len(seen) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
module.merge(plan, out, progress)
"""


@pytest.mark.slow
def test_a_killed_merge_goes_on_and_gives_the_same_bytes(checkpoints, tmp_path):
    base = sharded(checkpoints("qwen3"), tmp_path / "base")
    peft_adapter(base, tmp_path / "peft", DENSE)
    run(base, tmp_path / "peft", tmp_path / "straight")
    places = base, tmp_path / "peft", tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, places)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert run(*places)["files_kept_from_before"] > 0
    for path in (tmp_path / "straight").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_killed_merge_needs_room_for_what_is_missing_only(checkpoints, tmp_path, monkeypatch):
    base = sharded(checkpoints("qwen3"), tmp_path / "base")
    peft_adapter(base, tmp_path / "peft", DENSE)
    places = base, tmp_path / "peft", tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, *map(str, places)], check=False)
    there = sum(path.stat().st_size for path in (tmp_path / ".out.converting").iterdir())
    assert there > 100_000
    left = SimpleNamespace(free=plan_merge(base, tmp_path / "peft").num_bytes - there)
    monkeypatch.setattr("megatrain.export.resumable.shutil.disk_usage", lambda _: left)
    assert run(*places)["files_kept_from_before"] > 0


def test_a_result_that_is_found_wrong_gets_no_name(checkpoints, tmp_path, monkeypatch):
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", DENSE)
    plan, write = plan_merge(checkpoints("qwen3"), tmp_path / "peft"), merge_module.write_tensors

    def wrong(path, specs, value):
        return write(path, specs, lambda name: value(name) + ("norm" in name))

    monkeypatch.setattr(merge_module, "write_tensors", wrong)
    with pytest.raises(ExportError, match=r"not what the merge gives: model.layers"):
        merge(plan, tmp_path / "out", lambda _: None, verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


@pytest.mark.slow
def test_what_was_begun_with_another_adapter_is_not_gone_on_with(checkpoints, tmp_path):
    base = sharded(checkpoints("qwen3"), tmp_path / "base")
    peft_adapter(base, tmp_path / "peft", DENSE)
    places = base, tmp_path / "peft", tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, *map(str, places)], check=False)
    peft_adapter(base, tmp_path / "peft", DENSE, seed=1)
    with pytest.raises(ExportError, match="begun from something else: adapter differ"):
        run(*places)
    assert run(*places, restart=True)["files_kept_from_before"] == 0


def test_an_adapter_of_another_model_is_refused(checkpoints, tmp_path):
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", DENSE)
    with pytest.raises(ExportError):
        plan_merge(checkpoints("qwen3", hidden_size=32), tmp_path / "peft")
    weights = load_file(tmp_path / "peft" / WEIGHTS)
    key = next(key for key in weights if "layers.3.self_attn.q_proj.lora_B" in key)
    weights[key] = torch.cat([weights[key]] * 2)
    save_file(weights, tmp_path / "peft" / WEIGHTS)
    with pytest.raises(ExportError, match=r"q_proj"):
        plan_merge(checkpoints("qwen3"), tmp_path / "peft")


def test_a_base_whose_embedding_is_another_is_refused(checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    peft_adapter(folder, tmp_path / "peft", CASES["embedding and head"][1])
    with pytest.raises(ExportError, match=r"another (lm_head|model.embed_tokens).weight"):
        plan_merge(checkpoints("qwen3", seed=1), tmp_path / "peft")


def lose_shard(base):
    sorted(base.glob("*.safetensors"))[1].unlink()


def truncate(base):
    path = sorted(base.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:40])


def absent(base):
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.x.weight"] = min(index["weight_map"].values())
    path.write_text(json.dumps(index))


def outside(base):
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lose_shard, "are missing: model-00002"),
        (truncate, "cannot read shard .*model-00002"),
        (absent, "differ in 1 tensor"),
        (outside, "outside its folder: ../elsewhere.safetensors"),
    ],
)
def test_a_damaged_base_is_refused_before_anything_is_written(damage, text, checkpoints, tmp_path):
    base = sharded(checkpoints("qwen3"), tmp_path / "base")
    peft_adapter(base, tmp_path / "peft", DENSE)
    damage(base)
    with pytest.raises(CheckpointError, match=text):
        run(base, tmp_path / "peft", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "peft"]


def test_a_full_disk_is_said_and_leaves_nothing_at_the_target(checkpoints, tmp_path, small_disk):
    base = sharded(checkpoints("qwen3"), tmp_path / "base")
    peft_adapter(base, tmp_path / "peft", DENSE)
    with pytest.raises(ExportError, match="the disk is too full for the result"):
        run(base, tmp_path / "peft", small_disk / "out")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("what", ["a file", "another checkpoint", "the base"])
def test_nothing_is_replaced(what, checkpoints, tmp_path):
    folder, out = checkpoints("qwen3"), tmp_path / "out"
    peft_adapter(folder, tmp_path / "peft", DENSE)
    if what == "a file":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        base_model(folder if what == "the base" else checkpoints("llama")).save_pretrained(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ExportError, match="written to a new folder, and something is there"):
        run(out if what == "the base" else folder, tmp_path / "peft", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_empty_folder_is_filled(checkpoints, tmp_path):
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", DENSE)
    (tmp_path / "out").mkdir()
    run(checkpoints("qwen3"), tmp_path / "peft", tmp_path / "out")


def test_bytes_that_changed_after_the_merge_are_found(checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    peft_adapter(folder, tmp_path / "peft", DENSE)
    run(folder, tmp_path / "peft", tmp_path / "out")
    tensors = tensors_in(tmp_path / "out")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"not what the merge gives: model.norm.weight"):
        verify_merge(plan_merge(folder, tmp_path / "peft"), tmp_path / "out", lambda _: None)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
@pytest.mark.slow
def test_a_quantised_base_is_dequantised_and_says_so_no_more(kind, checkpoints, tmp_path):
    """The merge is that of the plain base, which has the dtype its configuration names."""
    if kind == "fp8":
        family, options = "qwen3", DENSE
        base = quantized_files.fp8_blocks(checkpoints(family), tmp_path / "base", (32, 32))
    else:
        family, options = "gpt_oss", CASES["gpt-oss"][1]
        base = quantized_files.mxfp4(checkpoints(family), tmp_path / "base")
    peft_adapter(checkpoints(family), tmp_path / "peft", options)
    plain = open_base(base).plain
    (tmp_path / "plain").mkdir()
    save_file({name: plain[name] for name in plain}, tmp_path / "plain" / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    assert run(base, tmp_path / "peft", tmp_path / "out")["dequantised"]
    run(tmp_path / "plain", tmp_path / "peft", tmp_path / "expected")
    ours, theirs = (tensors_in(tmp_path / each) for each in ("out", "expected"))
    assert same_bytes(ours, theirs)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    logits(base_model(tmp_path / "out"))


def wide_base(kind, checkpoints, tmp_path):
    """Return a base of large tensors, the same one plain, and LoRA's options."""
    if kind == "mxfp4":
        sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_local_experts": 96}
        folder = checkpoints(
            "gpt_oss", num_hidden_layers=1, layer_types=["full_attention"], **sizes
        )
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        options = {"target_modules": ["q_proj"], "target_parameters": experts}
        return quantized_files.mxfp4(folder, tmp_path / "base"), folder, options
    wide = {"vocab_size": 100_000, "hidden_size": 512, "num_hidden_layers": 1}
    base_model(checkpoints("qwen3", **wide)).save_pretrained(
        tmp_path / "base", max_shard_size="150MB"
    )
    return tmp_path / "base", tmp_path / "base", {"target_modules": ["q_proj", "lm_head"]}


@pytest.mark.slow
@pytest.mark.parametrize("adapted", ["all", "q_proj"])
@pytest.mark.parametrize("kind", ["plain", "mxfp4"])
def test_a_merge_needs_little_more_memory_than_its_largest_tensor(
    kind, adapted, checkpoints, tmp_path
):
    """Bound: 1.5 times the largest shard or tensor, and no more than the plan says."""
    base, plain, options = wide_base(kind, checkpoints, tmp_path)
    if adapted == "q_proj":
        options = {"target_modules": ["q_proj"]}
    peft_adapter(plain, tmp_path / "peft", options)
    places = [str(base), *(str(tmp_path / name) for name in ("peft", "out"))]
    report = tmp_path / "report.json"
    command = ["-m", "megatrain", "convert", "adapter", "merge", *places, "--report", str(report)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    largest = max(
        *(path.stat().st_size for path in base.glob("*.safetensors")),
        *(tensor.nbytes for tensor in tensors_in(tmp_path / "out").values()),
    )
    assert largest > 100e6
    found = json.loads(report.read_text())
    assert found["peak_memory_growth"] <= 1.5 * largest
    assert found["peak_memory_growth"] <= found["plan"]["memory_bytes"]
