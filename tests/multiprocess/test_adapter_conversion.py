"""Adapters made by PEFT are imported, trained and exported: each time as PEFT computes it."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from megatrain.export.adapters.from_state import for_peft, read_saved
from megatrain.export.adapters.import_adapter import import_adapter
from megatrain.export.peft_adapter import CONFIG, WEIGHTS, write_files
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import adapter_tasks
from tests.multiprocess.data import num_labels, random_batch
from tests.multiprocess.truth import (
    all_logps,
    hf_model,
    largest_adapter_difference,
    largest_difference,
    logps_of,
    peft_model,
)

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

BATCH = random_batch(6, seed=3)
TOLERANCE = 1e-5
DENSE = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "rank_pattern": {"k_proj": 2, "layers.1.mlp.gate_proj": 8},
    "alpha_pattern": {"v_proj": 2, "up_proj": 4},
    "use_rslora": True,
}
HEADS = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STACKED = {
    "target_modules": ["q_proj"],
    "target_parameters": EXPERTS,
    "rank_pattern": {"layers.1.mlp.experts.down_proj": 2},
}
FUSED = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}


def made_by_peft(folder, path, **options):
    model = get_peft_model(
        hf_model(folder), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options)
    )
    with torch.no_grad():  # PEFT's are of size 1, 50 times the embedding's own
        for name, parameter in model.named_parameters():
            if "lora_embedding" in name:
                parameter.mul_(0.1)
    model.save_pretrained(path)
    return model.eval()


def sgd_step(model, batch, max_norm):
    """Return PEFT's factors after a step at learning rate 1, under megatrain's names."""
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for parameter in factors.values():
        parameter.requires_grad_(True)
    loss = -sum(logps_of(model, datum).sum() for datum in batch) / num_labels(batch)
    loss.backward()
    nn.utils.clip_grad_norm_(list(factors.values()), max_norm)
    torch.optim.SGD(list(factors.values()), lr=1.0).step()
    return {
        name.removeprefix("base_model.model.")
        .replace(".default.weight", "")
        .replace("lora_embedding_A.default", "lora_A")
        .replace("lora_embedding_B.default", "lora_B"): parameter.detach()
        for name, parameter in factors.items()
    }


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([BATCH[0]["input_ids"]])).logits


@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(tp=2)], ids=["1", "tp2"])
@pytest.mark.parametrize("options", [DENSE, HEADS], ids=["linears", "embeddings"])
@pytest.mark.slow
def test_a_dense_adapter_of_pefts_is_trained_on_as_peft_trains_it(
    options, mesh, ranks, checkpoints, tmp_path
):
    folder = checkpoints("qwen3")
    theirs = made_by_peft(folder, tmp_path / "peft", **options)
    import_adapter(tmp_path / "peft", tmp_path / "state")
    ours = ranks.run(
        adapter_tasks.start_step_save, mesh, folder, tmp_path / "state", BATCH, tmp_path
    )[0]
    assert ours["place"] == {"cur_step": 0, "consumed_train_samples": None}
    assert largest_difference(ours["logps"], all_logps(theirs, BATCH)) <= TOLERANCE
    after = sgd_step(theirs, BATCH, 0.1)
    assert largest_adapter_difference(ours["after"], after) <= TOLERANCE
    assert largest_adapter_difference(ours["after"], ours["before"]) > 100 * TOLERANCE
    original = {k for k in load_file(tmp_path / "peft" / WEIGHTS) if "base_layer" not in k}
    write_files(tmp_path / "exported", for_peft(read_saved(Path(ours["saved"]))))
    assert load_file(tmp_path / "exported" / WEIGHTS).keys() == original
    exported = peft_model(folder, tmp_path / "exported")
    assert largest_difference(ours["logps after"], all_logps(exported, BATCH)) <= TOLERANCE
    untouched = peft_model(folder, ours["untouched"])
    expected = logits(peft_model(folder, tmp_path / "peft"))
    torch.testing.assert_close(logits(untouched), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(dp=2, ep=2)], ids=["1", "ep2"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", STACKED),
        ("qwen3_moe", FUSED),
        ("gpt_oss", STACKED),
        ("deepseek_v3", STACKED),
        ("mixtral", STACKED | {"target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
    ],
    ids=["qwen3-moe-stacked", "qwen3-moe-fused", "gpt-oss", "deepseek", "mixtral-router"],
)
@pytest.mark.slow
def test_experts_of_pefts_compute_the_same_here_and_in_peft_again(
    family, options, mesh, ranks, checkpoints, tmp_path
):
    folder = checkpoints(family)
    if family == "deepseek_v3":
        options = options | {"target_modules": ["q_a_proj"]}
    theirs = made_by_peft(folder, tmp_path / "peft", **options)
    import_adapter(tmp_path / "peft", tmp_path / "state")
    ours = ranks.run(
        adapter_tasks.start_step_save, mesh, folder, tmp_path / "state", BATCH, tmp_path
    )[0]
    assert largest_difference(ours["logps"], all_logps(theirs, BATCH)) <= TOLERANCE
    again = peft_model(folder, ours["untouched"])
    assert (logits(again) - logits(theirs)).abs().max() <= TOLERANCE
    assert (logits(peft_model(folder, ours["saved"])) - logits(theirs)).abs().max() > TOLERANCE


def test_an_export_of_a_state_trained_in_bf16_is_the_adapter_that_was_saved(
    ranks, checkpoints, tmp_path
):
    lora = {"r": 4, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}
    saved = ranks.run(
        adapter_tasks.start_in_bf16,
        DeviceMesh(tp=2, ep=2, dp=1),
        checkpoints("qwen3_moe"),
        lora,
        BATCH,
        tmp_path,
    )[0]
    write_files(tmp_path / "out", for_peft(read_saved(Path(saved))))
    theirs, ours = (load_file(f"{each}/{WEIGHTS}") for each in (saved, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert {each.dtype for each in ours.values()} == {torch.bfloat16}
    configs = [json.loads((path / CONFIG).read_text()) for path in (tmp_path / "out",)]
    with open(f"{saved}/{CONFIG}") as file:
        assert configs == [json.load(file)]


def test_an_imported_adapter_of_another_base_is_refused_by_name(ranks, checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    made_by_peft(folder, tmp_path / "peft", **HEADS)
    import_adapter(tmp_path / "peft", tmp_path / "state")
    other = checkpoints("qwen3", hidden_size=32)
    kinds, text = ranks.run(adapter_tasks.refusal, None, other, tmp_path / "state")[0]
    assert "CheckpointError" in kinds
    assert "lm_head (in, out) = (64, 512), the base has [(512, 32)]" in text
    weights = load_file(tmp_path / "peft" / WEIGHTS)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    weights[key] = weights[key] + 1
    save_file(weights, tmp_path / "peft" / WEIGHTS)
    import_adapter(tmp_path / "peft", tmp_path / "resized")
    kinds, text = ranks.run(adapter_tasks.refusal, None, folder, tmp_path / "resized")[0]
    assert "CheckpointError" in kinds
    assert "another model.embed_tokens.weight" in text
