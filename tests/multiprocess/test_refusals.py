"""Mistakes are answered by an error of the right kind that names the values, and change nothing."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import refusals, tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.truth import largest_adapter_difference, relative_difference

pytestmark = pytest.mark.multiprocess

GOOD = random_batch(4, seed=5)
TWO_RANKS = pytest.mark.parametrize(
    "mesh", [DeviceMesh(), DeviceMesh(tp=2), DeviceMesh(dp=2)], ids=DeviceMesh.describe
)


def check(answer, kind, *fragments):
    """Assert that an answer is an error of this kind and says these things."""
    assert answer is not None, "nothing was raised"
    kinds, text = answer
    assert kind in kinds, (kinds, text)
    for fragment in fragments:
        assert re.search(fragment, text), (fragment, text)


BATCHES = {
    "an empty batch": ([], "at least one datum"),
    "one datum instead of a list": ({"input_ids": [1], "labels": [1]}, "list"),
    "an empty datum": ([{"input_ids": [], "labels": []}], "datum 0 is empty"),
    "no input_ids": ([{"labels": [1, 2]}], "row 0 is not encoded: it has labels"),
    "mismatched lengths": ([GOOD[1], {"input_ids": [1, 2], "labels": [1]}], "datum 1.*1 labels"),
    "an id out of the vocabulary": ([{"input_ids": [1, 512], "labels": [1, 2]}], "512"),
    "a negative id": ([{"input_ids": [1, -3], "labels": [1, 2]}], "-3"),
    "a label out of the vocabulary": ([{"input_ids": [1, 2], "labels": [1, 512]}], "512"),
    "a negative label": ([{"input_ids": [1, 2], "labels": [1, -1]}], "-1"),
    "no label at all": ([{"input_ids": [1, 2, 3], "labels": [-100] * 3}], "nothing to train on"),
    "a label on the first token only": (
        [{"input_ids": [1, 2], "labels": [1, -100]}],
        "nothing to train on",
    ),
    "one token": ([{"input_ids": [1], "labels": [1]}], "nothing to train on"),
}
SLOPPY_BATCHES = {
    "ids that are not whole numbers": ([{"input_ids": [1.5, 2.0], "labels": [1, 2]}], "input_ids"),
    "ids that are text": ([{"input_ids": "hello", "labels": [1, 2]}], "input_ids"),
    "labels in two dimensions": ([{"input_ids": [1, 2], "labels": [[1], [2]]}], "labels"),
}


@pytest.fixture(scope="module")
def batch_report(ranks, checkpoints):
    given = {name: batch for name, (batch, _) in BATCHES.items()}
    return ranks.run(refusals.bad_batches, DeviceMesh(tp=2), checkpoints("qwen3"), GOOD, given)


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_that_cannot_be_trained_on_is_refused_on_every_rank(case, batch_report):
    for report in batch_report:
        check(report["answers"][case], "DataError", BATCHES[case][1])


def test_refused_batches_leave_gradients_as_they_were(batch_report):
    report = batch_report[0]
    assert relative_difference(report["after"], report["plain"]) == 0.0


@pytest.fixture(scope="module")
def sloppy_report(ranks, checkpoints):
    given = {name: batch for name, (batch, _) in SLOPPY_BATCHES.items()}
    return ranks.run(refusals.bad_batches, None, checkpoints("qwen3"), GOOD, given)


@pytest.mark.parametrize("case", SLOPPY_BATCHES)
def test_what_is_no_list_of_whole_numbers_is_refused(case, sloppy_report):
    check(sloppy_report[0]["answers"][case], "DataError", "datum 0", SLOPPY_BATCHES[case][1])


def test_evaluation_refuses_ids_out_of_the_vocabulary_but_needs_no_labels(ranks, checkpoints):
    given = {
        "labels": [{"input_ids": [1, 2], "labels": [-100, -100]}],
        "id": [{"input_ids": [1, 999], "labels": [-100, -100]}],
        "empty": [],
    }
    found = ranks.run(refusals.bad_evaluations, None, checkpoints("qwen3"), given)[0]
    assert found["labels"] is None
    check(found["id"], "DataError", "999")
    check(found["empty"], "DataError", "at least one datum")


LORA_MISTAKES = {
    "an unknown target": ({"target_modules": ["q_proj", "w_pack"]}, "w_pack.*q_proj"),
    "an expression that matches nothing": ({"target_modules": r".*\.nothing"}, "nothing"),
    "an unknown field": ({"target_modules": ["q_proj"], "rang": 4}, "rang"),
    "no target": ({"r": 4}, "targets"),
    "rank zero": ({"target_modules": ["q_proj"], "r": 0}, "at least 1"),
    "what is not supported": ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora"),
}


@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(pp=2)], ids=DeviceMesh.describe)
def test_an_adapter_that_cannot_be_is_refused_by_name_and_leaves_no_trace(mesh, ranks, checkpoints):
    configs = {name: config for name, (config, _) in LORA_MISTAKES.items()}
    for report in ranks.run(refusals.bad_adapters, mesh, checkpoints("qwen3"), configs):
        for name, (_, fragment) in LORA_MISTAKES.items():
            check(report["answers"][name], "ConfigError", fragment)
        assert report["adapters"] == []
        assert report["modules"] == []


def test_experts_gate_proj_without_up_proj_is_refused(ranks, checkpoints):
    configs = {
        "gate": {"target_modules": ["gate_proj"]},
        "up": {"target_modules": ["up_proj", "q_proj"]},
        "some experts": {"target_modules": r".*experts\.[01]\.down_proj"},
    }
    report = ranks.run(refusals.bad_adapters, None, checkpoints("qwen3_moe"), configs)[0]
    check(report["answers"]["gate"], "ConfigError", "together")
    check(report["answers"]["up"], "ConfigError", "together")
    check(report["answers"]["some experts"], "ConfigError", "experts of one layer")
    assert (report["adapters"], report["modules"]) == ([], [])


def test_unknown_optimizers_schedulers_and_options_are_refused(ranks, checkpoints):
    found = ranks.run(refusals.bad_optimizers, None, checkpoints("qwen3"))[0]
    check(found["scheduler before optimizer"], "StateError", "set_optimizer")
    check(found["unknown optimizer"], "ConfigError", "'Lion'.*AdamW")
    check(found["unknown optimizer option"], "ConfigError", "learning_rate")
    check(found["negative learning rate"], "ConfigError", "-1.0")
    check(found["unknown scheduler"], "ConfigError", "'Step'.*CosineWarmupScheduler")
    check(found["missing scheduler option"], "ConfigError", "num_warmup_steps")
    check(found["unknown scheduler option"], "ConfigError", "warmup")


def test_unknown_options_of_a_model_are_refused(ranks, checkpoints):
    options = {
        "precision": {"mixed_precision": "fp8"},
        "name": {"mixed_precision": "no", "tensor_parallel": 2},
        "budget": {"mixed_precision": "no", "max_tokens_per_microbatch": 0},
        "backend": {"mixed_precision": "no", "backend": "te"},
    }
    found = ranks.run(refusals.bad_models, None, checkpoints("qwen3"), options)[0]
    check(found["precision"], "ConfigError", "mixed_precision")
    check(found["name"], "ConfigError", "tensor_parallel")
    check(found["budget"], "ConfigError", "max_tokens_per_microbatch")
    check(found["backend"], "ConfigError", "Transformer Engine")


@pytest.mark.parametrize(
    ("family", "mesh", "fragment"),
    [
        ("qwen3", DeviceMesh(tp=8), "heads: tp=8, heads=4"),
        ("qwen3", DeviceMesh(pp=8), "pp=8.*layers=4"),
        ("qwen3", DeviceMesh(pp=2, vpp=4), "vpp=4.*layers=4"),
        ("qwen3", DeviceMesh(dp=2, ep=2), "no experts: ep=2"),
        ("qwen3", DeviceMesh(tp=2, etp=2), "no experts: ep=1, etp=2"),
        ("qwen3_moe", DeviceMesh(dp=8, ep=8), "ep=8, experts=4"),
    ],
    ids=lambda value: value.describe() if isinstance(value, DeviceMesh) else None,
)
def test_a_layout_that_the_model_does_not_fit_is_refused_on_every_rank(
    family, mesh, fragment, ranks, checkpoints
):
    options = {"model": {"mixed_precision": "no"}}
    for found in ranks.run(refusals.bad_models, mesh, checkpoints(family), options):
        check(found["model"], "LayoutError", fragment)


def test_calls_in_the_wrong_order_are_refused_and_harmless(ranks, checkpoints):
    found = ranks.run(refusals.wrong_order, DeviceMesh(dp=2), checkpoints("qwen3"), GOOD)[0]
    assert found.pop("everything in order again") is None
    for answer in found.values():
        check(answer, "StateError")
    check(found["step without an optimizer"], "StateError", "set_optimizer")
    check(found["step without gradients"], "StateError", "forward_backward")
    check(found["an unknown adapter"], "StateError", "'other'.*default")


@pytest.mark.parametrize(
    ("mesh", "where"),
    [
        (DeviceMesh(), r"rank\(s\) \[0\]"),
        (DeviceMesh(dp=2), r"rank\(s\) \[0, 1\]"),
        (DeviceMesh(pp=2), r"rank\(s\) \[1\]"),
        (DeviceMesh(tp=2, pp=2), r"rank\(s\) \[2\]"),
    ],
    ids=["1", "dp2", "pp2", "tp2-pp2"],
)
def test_a_loss_that_is_not_a_number_names_step_and_ranks_and_gradients_stay(
    mesh, where, ranks, checkpoints
):
    reports = ranks.run(refusals.not_finite, mesh, checkpoints("qwen3"), GOOD)
    for report in reports:
        check(report["train"], "NonFiniteError", where, "step 1")
        check(report["train"], "ArithmeticError")
        check(report["evaluate"], "NonFiniteError", where)
        assert report["tokens"][0] == report["tokens"][1]
    assert relative_difference(reports[0]["after"], reports[0]["plain"]) == 0.0


def test_after_a_first_loss_that_is_not_a_number_there_is_nothing_to_step_on(ranks, checkpoints):
    report = ranks.run(refusals.not_finite_at_once, None, checkpoints("qwen3"), GOOD)[0]
    check(report["train"], "NonFiniteError", "step 0")
    check(report["step"], "StateError", "no gradient")
    assert largest_adapter_difference(report["before"], report["after"]) == 0.0


@TWO_RANKS
def test_an_infinite_gradient_is_dropped_and_named(mesh, ranks, checkpoints):
    reports = ranks.run(refusals.gradient_overflows, mesh, checkpoints("qwen3"), GOOD)
    for report in reports:
        check(report["error"], "NonFiniteError", "step 0")
        assert report["next"] > 0
    assert largest_adapter_difference(reports[0]["before"], reports[0]["after"]) == 0.0


def test_a_checkpoint_of_nan_weights_is_named_when_it_is_first_used(ranks, checkpoints, tmp_path):
    folder = copied(checkpoints("qwen3"), tmp_path / "nan")
    change(folder, lambda t: t["model.norm.weight"].fill_(float("nan")))
    report = ranks.run(tasks.outcome, DeviceMesh(tp=2), folder, GOOD)[0]
    check(report, "NonFiniteError", "step 0", r"rank\(s\) \[0\]")


# Checkpoints


def copied(source, target):
    return shutil.copytree(source, target)


def change(folder, edit):
    """Edit the tensors of a folder's only shard."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def write_index(folder, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def broken_checkpoints(checkpoints, tmp_path_factory):
    """Copies of a good checkpoint, each with one thing wrong."""
    root, source = tmp_path_factory.mktemp("broken"), checkpoints("qwen3")

    def new(name):
        return copied(source, root / name)

    names = list(load_file(source / "model.safetensors"))
    folder = new("truncated")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    (new("garbage") / "model.safetensors").write_bytes(b"not a safetensors file at all")
    write_index(new("missing shard"), dict.fromkeys(names, "model-00002-of-00002.safetensors"))
    write_index(
        new("index lies"), {**dict.fromkeys(names, "model.safetensors"), "x": "model.safetensors"}
    )
    (new("index is not json") / "model.safetensors.index.json").write_text("{")
    change(new("missing tensor"), lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    change(
        new("renamed tensor"),
        lambda t: t.update(up_proj=t.pop("model.layers.1.self_attn.q_proj.weight")),
    )
    change(
        new("too few rows"),
        lambda t: t.update(
            {"model.layers.1.mlp.up_proj.weight": torch.zeros(120, 64)},
        ),
    )
    change(
        new("too many columns"),
        lambda t: t.update({"model.layers.2.mlp.down_proj.weight": torch.zeros(64, 130)}),
    )
    change(
        new("norm of another size"),
        lambda t: t.update({"model.norm.weight": torch.zeros(65)}),
    )
    change(
        new("small vocabulary"),
        lambda t: t.update({"model.embed_tokens.weight": torch.zeros(500, 64)}),
    )
    folder = new("no safetensors")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    folder = new("unknown architecture")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["GPTJForCausalLM"], "model_type": "gptj"})
    )
    (new("no config") / "config.json").unlink()
    folder = new("config is not json")
    (folder / "config.json").write_text("{")
    return {path.name: path for path in sorted(root.iterdir())} | {"nowhere": root / "nowhere"}


CHECKPOINT_ERRORS = {
    "truncated": r"cannot read shard .*truncated/model\.safetensors",
    "garbage": r"cannot read shard .*garbage/model\.safetensors",
    "missing shard": r"1 shard\(s\).*model-00002-of-00002\.safetensors",
    "index lies": r"lacks 'x'",
    "index is not json": "not a safetensors index",
    "missing tensor": r"model\.layers\.1\.mlp\.up_proj\.weight",
    "renamed tensor": r"model\.layers\.1\.self_attn\.q_proj\.weight",
    "too few rows": r"up_proj.*248 rows.*256",
    "too many columns": r"\(64, 130\).*\(64, 128\)",
    "norm of another size": r"\(65,\).*\(64,\)",
    "small vocabulary": "embed_tokens.*500",
    "no safetensors": "weights are read from safetensors only",
    "no config": r"config\.json",
    "config is not json": r"config\.json",
    "nowhere": "nowhere",
}


@pytest.fixture(scope="module")
def checkpoint_answers(ranks, broken_checkpoints):
    return ranks.run(refusals.open_folders, None, broken_checkpoints)[0]


@pytest.mark.parametrize("case", CHECKPOINT_ERRORS)
def test_a_broken_checkpoint_is_refused_with_what_is_wrong(case, checkpoint_answers):
    check(checkpoint_answers[case], "CheckpointError", CHECKPOINT_ERRORS[case])


def test_an_architecture_without_a_bridge_is_refused(checkpoint_answers):
    check(checkpoint_answers["unknown architecture"], "UnknownFamilyError", "GPTJ")


def test_more_rows_than_the_vocabulary_has_are_refused(ranks, checkpoints, tmp_path):
    folder = copied(checkpoints("qwen3"), tmp_path / "large")
    change(folder, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(520, 64)}))
    check(
        ranks.run(refusals.open_folders, None, {"large": folder})[0]["large"],
        "CheckpointError",
        "embed_tokens.*520",
    )
