"""Activations and gradients module by module, on layouts and in Transformers: one result, and a
planted defect that is named where it was planted.
"""

import argparse
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatrain.cli.convert import verify
from megatrain.errors import ConfigError
from megatrain.export.compare import trace_transformers
from megatrain.export.compare.layers import compare_traces
from megatrain.export.compare.tokens import random_tokens
from megatrain.export.compare.trace import LOGPROBS, read_trace
from megatrain.export.verify import DATA, REQUEST
from megatrain.parallel.layout import DeviceMesh
from megatrain.testing.ranks import RankFailure
from tests.multiprocess.compare_tasks import trace

pytestmark = pytest.mark.multiprocess

HOW = ("A", "B")


@pytest.fixture
def in_transformers(tmp_path):
    """Return a function that traces a checkpoint in this process, where nothing is patched."""

    def run(checkpoint, adapter=None):
        folder = tmp_path / "transformers"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        request = {"base_model": str(checkpoint), "adapter": adapter and str(adapter)}
        (folder / REQUEST).write_text(json.dumps(request | {"dtype": "float32"}))
        data = random_tokens(checkpoint)
        ids = {f"input_ids.{i}": torch.tensor(d["input_ids"]) for i, d in enumerate(data)}
        save_file(ids, folder / DATA)
        trace_transformers.trace(folder)
        return read_trace(folder)

    return run


@pytest.fixture
def on_ranks(ranks, tmp_path):
    """Return a function that traces a checkpoint on the ranks of a mesh."""

    def run(checkpoint, mesh, adapter=None):
        folder = tmp_path / f"ranks-{mesh.describe()}"
        folder.mkdir()
        ranks.run(trace, mesh, str(checkpoint), folder, random_tokens(checkpoint), adapter)
        return read_trace(folder)

    return run


@pytest.mark.parametrize(
    ("family", "mesh", "points"),
    [
        ("qwen3", DeviceMesh(tp=2), 51),
        pytest.param("qwen3", DeviceMesh(pp=2), 51, marks=pytest.mark.slow),
        pytest.param("qwen3", DeviceMesh(cp=2), 51, marks=pytest.mark.slow),
        ("qwen3", DeviceMesh(tp=2, pp=2, cp=2), 51),
        ("qwen3_moe", DeviceMesh(tp=2, ep=2), 39),
        ("deepseek_v3", DeviceMesh(tp=2), 62),
        pytest.param("gpt_oss", DeviceMesh(tp=2), 39, marks=pytest.mark.slow),
        pytest.param("gemma2", DeviceMesh(tp=2), 43, marks=pytest.mark.slow),
        pytest.param("qwen3_next", DeviceMesh(tp=2), 46, marks=pytest.mark.slow),
        pytest.param("mixtral", DeviceMesh(cp=2, ep=2), 39, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.describe() if isinstance(value, DeviceMesh) else str(value),
)
def test_every_module_computes_what_transformers_computes(
    checkpoints, in_transformers, on_ranks, family, mesh, points
):
    checkpoint = checkpoints(family)
    ours = on_ranks(checkpoint, mesh)
    report = compare_traces(in_transformers(checkpoint), ours, tolerance=1e-5, how=HOW)
    assert report.same, (report.first_activation, report.first_gradient)
    assert not report.only_in_b
    assert len(report.points) >= points, [point.name for point in report.points]
    assert all(point.gradient is not None for point in report.points)
    assert report.points[-1].name == LOGPROBS


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.2.mlp.down_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.3.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
    ],
)
def test_a_planted_defect_is_named_and_nothing_before_it(
    checkpoints, tmp_path, in_transformers, on_ranks, module
):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints("qwen3"), copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{module}.weight"][5] *= 1.5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    reference = in_transformers(checkpoints("qwen3"))
    report = compare_traces(
        reference, on_ranks(copy, DeviceMesh(tp=2, cp=2)), tolerance=1e-5, how=HOW
    )
    assert report.first_activation.name == module
    before = [*reference][: [*reference].index(module)]
    assert {p.name for p in report.points if p.activation <= 1e-5} >= set(before) & {
        p.name for p in report.points
    }


def test_a_defect_of_the_backward_pass_alone_is_named(checkpoints, in_transformers):
    first = in_transformers(checkpoints("qwen3"))
    other = in_transformers(checkpoints("qwen3"))
    name = "model.layers.1.mlp"
    for gradients in other[name].gradients.values():
        gradients[3] *= 1.01
    report = compare_traces(first, other, tolerance=1e-4, how=HOW)
    assert report.first_activation is None
    assert report.first_gradient.name == name


def test_an_adapter_computes_what_peft_computes(checkpoints, tmp_path, in_transformers, on_ranks):
    checkpoint, adapter = checkpoints("qwen3"), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"])
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    peft.save_pretrained(adapter)
    expected = in_transformers(checkpoint, adapter)
    actual = on_ranks(checkpoint, DeviceMesh(tp=2), adapter)
    report = compare_traces(expected, actual, tolerance=1e-5, how=HOW)
    assert report.same, (report.first_activation, report.first_gradient)
    assert len(report.points) == 51
    assert not compare_traces(expected, in_transformers(checkpoint), tolerance=1e-3, how=HOW).same


def test_a_layout_with_data_parallel_ranks_is_refused(checkpoints, on_ranks):
    with pytest.raises(RankFailure, match=f"{ConfigError.__name__}.*without dp and vpp"):
        on_ranks(checkpoints("qwen3"), DeviceMesh(dp=2))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_names_the_module(checkpoints, tmp_path, capsys):
    copy, module = tmp_path / "copy", "model.layers.2.mlp.down_proj"
    shutil.copytree(checkpoints("qwen3"), copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{module}.weight"][0, 0] += 1.0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    parser = argparse.ArgumentParser()
    verify.add_parser(parser.add_subparsers())
    options = ["--layers", "--with", "megatrain", "--tp", "2", "--json"]
    args = parser.parse_args(["verify", str(checkpoints("qwen3")), str(copy), *options])
    assert args.run(args) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["layers"]["first_activation"] == module
