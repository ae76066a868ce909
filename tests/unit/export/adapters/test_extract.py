"""Adapters of the difference of two checkpoints: what PEFT merged is found again."""

import pytest
import torch
from safetensors.torch import save_file

from megatrain.errors import ConfigError, ExportError
from megatrain.export.adapters.extract import extract, plan_extract, verify_extract
from megatrain.export.peft_adapter import write_files
from tests.unit.export.adapters.made import (
    CASES,
    base_model,
    load_peft,
    logits,
    merged_by_peft,
    peft_adapter,
    tensors_in,
)


def run(base, tuned, out, rank, *, ignored=(), **options):
    job = plan_extract(base, tuned, rank=rank, ignored=ignored)
    found = extract(job, lambda _: None, base_model="x", **options)
    write_files(out, found.files)
    assert verify_extract(job, out) == pytest.approx(found.relative_error, abs=1e-5)
    return found


FOUND = {name: case for name, case in CASES.items() if name != "experts and router"}


@pytest.mark.parametrize(("family", "options"), FOUND.values(), ids=FOUND.keys())
@pytest.mark.slow
def test_what_peft_merged_is_found_again(family, options, checkpoints, tmp_path):
    folder = checkpoints(family)
    model = peft_adapter(folder, tmp_path / "peft", options)
    expected = logits(model)
    merged_by_peft(model, tmp_path / "tuned")
    found = run(folder, tmp_path / "tuned", tmp_path / "out", 8)
    assert found.relative_error <= 1e-5
    assert (logits(base_model(folder)) - expected).abs().max() > 1e-3
    ours = load_peft(folder, tmp_path / "out")
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-4)


def test_a_smaller_rank_is_the_best_one_and_says_what_is_lost(checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    model = peft_adapter(folder, tmp_path / "peft", {"target_modules": ["q_proj", "down_proj"]})
    tuned, base = merged_by_peft(model, tmp_path / "tuned"), tensors_in(folder)
    found = run(folder, tmp_path / "tuned", tmp_path / "out", 2)
    left = whole = 0.0
    for name, value in tuned.items():
        if not torch.equal(value, base[name]):
            singular = torch.linalg.svdvals(value - base[name]).double()
            left += float(singular[2:].square().sum())
            whole += float(singular.square().sum())
    assert found.relative_error == pytest.approx((left / whole) ** 0.5, rel=1e-4)
    assert len(found.errors) == 8
    half = run(folder, tmp_path / "tuned", tmp_path / "half", 2, dtype=torch.bfloat16)
    assert {each.dtype for each in half.files.weights.values()} == {torch.bfloat16}


def changed(folder, path, *changes):
    """Write a checkpoint with some tensors moved, each by a matrix of rank 1."""
    tensors = tensors_in(folder)
    for name in changes:
        value = tensors[name]
        ones = torch.ones_like(value)
        tensors[name] = value + 0.5 * ones
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text((folder / "config.json").read_text())
    return path


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.2.gate_proj.weight"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj"),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"),
    ],
)
@pytest.mark.slow
def test_a_single_expert_or_router_that_changed_is_held(family, name, checkpoints, tmp_path):
    folder = checkpoints(family)
    tuned = changed(folder, tmp_path / "tuned", name)
    found = run(folder, tuned, tmp_path / "out", 1)
    assert found.relative_error <= 1e-5
    ours = load_peft(folder, tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(base_model(tuned)), rtol=0, atol=1e-4)


def test_a_tied_embedding_becomes_two_adapters(checkpoints, tmp_path):
    folder = checkpoints("qwen3_tied")
    tuned = changed(folder, tmp_path / "tuned", "model.embed_tokens.weight")
    run(folder, tuned, tmp_path / "out", 1)
    ours = load_peft(folder, tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(base_model(tuned)), rtol=1e-4, atol=1e-4)


def test_what_an_adapter_cannot_hold_is_refused_unless_it_is_left_out(checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    norm, matrix = "model.layers.2.input_layernorm.weight", "model.layers.2.mlp.up_proj.weight"
    tuned = changed(folder, tmp_path / "tuned", norm, matrix)
    with pytest.raises(ExportError, match=r"1 tensor.*cannot hold: model.layers.2.input_layernorm"):
        run(folder, tuned, tmp_path / "out", 1)
    assert run(folder, tuned, tmp_path / "out", 1, ignored=["*norm*"]).ignored == [norm]
    with pytest.raises(ExportError, match="the same: there is nothing to extract"):
        run(folder, folder, tmp_path / "out", 1)
    with pytest.raises(ConfigError, match="--rank must be at least 1: 0"):
        run(folder, tuned, tmp_path / "out", 0)


def test_two_models_are_refused(checkpoints, tmp_path):
    with pytest.raises(ExportError, match="in one checkpoint only, or of another shape"):
        run(checkpoints("qwen3"), checkpoints("qwen3_moe"), tmp_path / "out", 1)
