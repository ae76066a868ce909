"""Resized and averaged adapters, each against the weights that PEFT would add."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.errors import ConfigError, ExportError
from megatrain.export.adapters.average import average
from megatrain.export.adapters.peft_file import as_file, read_peft
from megatrain.export.adapters.resize import distance, resize
from megatrain.export.peft_adapter import CONFIG, WEIGHTS, write_files
from tests.unit.export.adapters.made import (
    CASES,
    DENSE,
    FUSED,
    STACKED,
    load_peft,
    logits,
    peft_adapter,
    same_bytes,
    tensors_in,
)


def deltas(model):
    """Return what PEFT adds to every parameter."""
    return {
        re.sub(r"(\.base_layer)+$", "", name) + getattr(layer, "parameter_name", ""): (
            layer.get_delta_weight("default").detach()
        )
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def relative(ours, theirs):
    assert ours.keys() == theirs.keys()
    gap = sum(float((ours[name] - value).square().sum()) for name, value in theirs.items())
    return (gap / sum(float(value.square().sum()) for value in theirs.values())) ** 0.5


@pytest.mark.parametrize("rank", [3, 16])
@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES.keys())
@pytest.mark.slow
def test_a_resized_adapter_is_as_far_away_as_it_says(family, options, rank, checkpoints, tmp_path):
    folder = checkpoints(family)
    theirs = peft_adapter(folder, tmp_path / "peft", options)
    file = read_peft(tmp_path / "peft")
    found = resize(file, rank, lambda _: None)
    write_files(tmp_path / "out", found.files)
    again = read_peft(tmp_path / "out")
    assert {layer.rank for layer in again.layers} == {rank}
    ours = load_peft(folder, tmp_path / "out")
    error = relative(deltas(ours), deltas(theirs))
    assert found.relative_error == pytest.approx(error, abs=2e-6)
    assert distance(file, again) == pytest.approx(found.relative_error, abs=1e-6)
    if rank == 16:
        assert found.relative_error == 0
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    else:
        assert 0.01 < found.relative_error < 1
        assert max(found.errors.values()) > 0


@pytest.mark.parametrize(("family", "options"), [("qwen3", DENSE), ("gpt_oss", STACKED)])
def test_the_cut_is_the_best_there_is(family, options, checkpoints, tmp_path):
    folder = checkpoints(family)
    theirs = deltas(peft_adapter(folder, tmp_path / "peft", options))
    found = resize(read_peft(tmp_path / "peft"), 2, lambda _: None)
    write_files(tmp_path / "out", found.files)
    for name, ours in deltas(load_peft(folder, tmp_path / "out")).items():
        matrices = theirs[name] if theirs[name].dim() == 3 else theirs[name][None]
        left = (matrices - ours.reshape(matrices.shape)).flatten(1).norm(dim=1)
        best = torch.linalg.svdvals(matrices)[:, 2:].norm(dim=1)
        torch.testing.assert_close(left, best, rtol=1e-4, atol=1e-4)


def test_a_bf16_adapter_stays_one_and_its_rounding_counts(checkpoints, tmp_path):
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", DENSE, dtype=torch.bfloat16)
    found = resize(read_peft(tmp_path / "peft"), 8, lambda _: None)
    assert {each.dtype for each in found.files.weights.values()} == {torch.bfloat16}
    assert found.relative_error == 0
    cut = resize(as_file(found.files), 4, lambda _: None)
    small = max(error for name, error in cut.errors.items() if "k_proj" in name)
    assert 1e-4 < small < 2**-6


@pytest.mark.parametrize(
    ("family", "options"), [("qwen3", DENSE), ("qwen3_moe", FUSED), ("gpt_oss", STACKED)]
)
def test_an_average_is_the_weighted_sum_of_what_peft_adds(family, options, checkpoints, tmp_path):
    folder, weights, sums = checkpoints(family), (0.3, 0.9, -0.2), {}
    other = {"lora_alpha": 3, "use_rslora": False, "rank_pattern": {}, "r": 5}
    if options is FUSED:
        other = {"lora_alpha": 3}
    for index, weight in enumerate(weights):
        place = tmp_path / str(index)
        model = peft_adapter(folder, place, options | (other if index else {}), seed=index)
        for name, value in deltas(model).items():
            sums[name] = sums.get(name, 0) + weight * value
    files = [read_peft(tmp_path / str(index)) for index in range(3)]
    write_files(tmp_path / "out", average(files, weights, lambda _: None))
    assert relative(deltas(load_peft(folder, tmp_path / "out")), sums) <= 1e-6
    summed = read_peft(tmp_path / "out")
    cut = resize(summed, 100, lambda _: None)
    assert cut.relative_error == 0


def test_bf16_adapters_stay_bf16_where_weights_and_scales_are_exact(checkpoints, tmp_path):
    for seed in (0, 1):
        place = tmp_path / str(seed)
        options = {"target_modules": ["q_proj"]}
        peft_adapter(checkpoints("qwen3"), place, options, seed=seed, dtype=torch.bfloat16)
    files = [read_peft(tmp_path / str(seed)) for seed in (0, 1)]
    for weights, dtype in (((0.5, 0.5), torch.bfloat16), ((0.3, 0.7), torch.float32)):
        found = average(files, weights, lambda _: None)
        assert {each.dtype for each in found.weights.values()} == {dtype}


def test_one_adapter_averaged_with_itself_is_itself(checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    model = peft_adapter(folder, tmp_path / "peft", CASES["embedding and head"][1])
    file = read_peft(tmp_path / "peft")
    write_files(tmp_path / "out", average([file, file], [0.25, 0.75], lambda _: None))
    ours = load_peft(folder, tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=1e-5)


def test_adapters_that_do_not_go_together_are_refused(checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    for name, targets in (("q", ["q_proj"]), ("qk", ["q_proj", "k_proj"])):
        peft_adapter(folder, tmp_path / name, {"target_modules": targets})
    q, qk = (read_peft(tmp_path / name) for name in ("q", "qk"))
    with pytest.raises(ExportError, match=r"4 differ: model.layers.0.self_attn.k_proj"):
        average([q, qk], [0.5, 0.5], lambda _: None)
    with pytest.raises(ConfigError, match="one finite weight for each adapter: 2 adapters"):
        average([q, q], [1.0], lambda _: None)
    with pytest.raises(ConfigError, match="one finite weight"):
        average([q, q], [1.0, float("nan")], lambda _: None)


def test_experts_named_in_target_modules_get_one_rank_or_none(checkpoints, tmp_path):
    """PEFT takes r and lora_alpha alone for them, so a pattern could not be kept."""
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", DENSE)
    old = load_file(tmp_path / "peft" / WEIGHTS)
    weights = {}
    for key, value in old.items():
        if ".mlp." not in key:
            weights[key] = value
            continue
        for e in range(2):
            weights[key.replace(".mlp.", f".mlp.experts.{e}.")] = value.clone()
    save_file(weights, tmp_path / "peft" / WEIGHTS)
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    config["rank_pattern"] = {"k_proj": 2, r"layers.1.mlp.experts.\d+.gate_proj": 8}
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(config))
    file = read_peft(tmp_path / "peft")
    with pytest.raises(ExportError, match="one rank and alpha for all experts"):
        average([file, file], [0.5, 0.5], lambda _: None)
    assert not same_bytes(weights, tensors_in(checkpoints("qwen3")))
