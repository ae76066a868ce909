"""Training stopped on one layout goes on on another as if it had not stopped."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatrain.export.state.record import read_record
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import resume_tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.tasks import LORA
from tests.multiprocess.truth import largest_difference

pytestmark = pytest.mark.multiprocess

BATCHES = [random_batch(7, seed=seed, longest=40) for seed in range(10)]
PAUSE = 5
TOLERANCE = 1e-5
"""Float32 sums in another order; ten steps at lr 1e-4 move log-probabilities by 1e-2."""

ONE = DeviceMesh()
ADAMW = resume_tasks.ADAMW
MUON = {"optimizer_cls": "Muon", "lr": 1e-4, "ns_dtype": "float32"}
LORA_PLUS = ADAMW | {"loraplus_lr_ratio": 16.0, "offload_optimizer": True}
PADDED = {"vocab_size": 520}


@dataclass(frozen=True)
class Case:
    """What is trained, where it starts and where it goes on."""

    family: str
    first: DeviceMesh
    second: DeviceMesh
    lora: dict[str, Any] = field(default_factory=lambda: LORA)
    optimizer: dict[str, Any] = field(default_factory=lambda: ADAMW)
    changes: dict[str, Any] = field(default_factory=dict)
    adapter_tolerance: float = TOLERANCE

    def __str__(self):
        what = "lora" if self.lora else "full"
        names = self.family, what, self.optimizer["optimizer_cls"], self.first.describe(), "to"
        return "-".join([*names, self.second.describe()]).replace("·", "-")


PAIRS = [
    Case("qwen3", DeviceMesh(tp=2, pp=2), DeviceMesh(tp=1)),
    Case("qwen3_moe", DeviceMesh(dp=2, ep=2), DeviceMesh(tp=2)),
    Case("qwen3", DeviceMesh(dp=4), DeviceMesh(cp=2)),
    Case("qwen3_moe", ONE, DeviceMesh(tp=2, ep=2)),
]
EMBEDDINGS = LORA | {"target_modules": ["embed_tokens", "lm_head", "gate_proj", "up_proj"]}
MORE = [
    Case("qwen3_tied", DeviceMesh(tp=2, pp=2), DeviceMesh(dp=2), lora={}, changes=PADDED),
    Case("qwen3_tied", DeviceMesh(dp=2), DeviceMesh(pp=2), lora={}),
    Case("qwen3_moe", DeviceMesh(tp=2, ep=2), DeviceMesh(dp=2, pp=2), lora={}),
    Case("qwen3", DeviceMesh(tp=2), ONE, lora=EMBEDDINGS, changes=PADDED),
    Case("qwen3_moe", DeviceMesh(tp=2, ep=2), ONE, optimizer=MUON, adapter_tolerance=1e-4),
    Case("qwen3", ONE, DeviceMesh(tp=2, pp=2), lora={}, optimizer=MUON, adapter_tolerance=1e-4),
    Case("qwen3", DeviceMesh(dp=2), DeviceMesh(pp=2, vpp=2), optimizer=LORA_PLUS),
    Case("qwen3_tied", DeviceMesh(dp=4, fsdp=2), DeviceMesh(tp=2), lora={}, changes=PADDED),
    Case("qwen3", ONE, DeviceMesh(dp=2, fsdp=2), lora={}),
    Case("qwen3", DeviceMesh(dp=2, fsdp=2), DeviceMesh(pp=2)),
]
"""Newton-Schulz in float32 raises the smallest singular values, and rounding with them."""
MUON_PAIRS = [replace(case, optimizer=MUON, adapter_tolerance=1e-4) for case in PAIRS]


def check(case, ranks, checkpoints, tmp_path):
    folder = checkpoints(case.family, **case.changes)
    paused = ranks.run(
        resume_tasks.save_in_the_middle,
        case.first,
        folder,
        case.lora,
        case.optimizer,
        BATCHES,
        PAUSE,
        tmp_path,
    )[0]
    resumed = ranks.run(
        resume_tasks.go_on, case.second, folder, paused["path"], BATCHES[PAUSE:], tmp_path
    )[0]
    assert resumed["place"] == {"cur_step": PAUSE, "consumed_train_samples": 7 * PAUSE}
    assert resumed["rates"] == paused["rates"]
    assert resumed["losses"] == pytest.approx(paused["losses"], abs=TOLERANCE)
    assert largest_difference(resumed["logps"], paused["logps"]) <= TOLERANCE
    assert relative_l2(resumed["tensors"], paused["tensors"]) <= case.adapter_tolerance
    check_same_state(Path(paused["path"]), Path(resumed["again"]))


def check_same_state(saved, again):
    """The states of two layouts hold the same bits under the same names."""
    records = [read_record(each) for each in (saved, again)]
    for part in ("tensors", "optimizer", "schedule", "step", "lora", "fingerprint", "seed"):
        assert getattr(records[0], part) == getattr(records[1], part)
    assert set(records[0].tensors) > {"master"}
    ours, theirs = state_tensors(saved), state_tensors(again)
    assert ours.keys() == theirs.keys() == set(records[0].tensors)
    for kind, tensors in ours.items():
        assert tensors.keys() == theirs[kind].keys()
        assert all(torch.equal(value, theirs[kind][name]) for name, value in tensors.items())
        assert any(value.count_nonzero() for value in tensors.values())


def state_tensors(path):
    result = {}
    for file in sorted((Path(path) / "state").glob("*/*.safetensors")):
        result.setdefault(file.parent.name, {}).update(load_file(file))
    return result


def relative_l2(ours, theirs):
    assert ours.keys() == theirs.keys()
    gap = sum(float((ours[k].double() - theirs[k].double()).square().sum()) for k in ours)
    return (gap / sum(float(v.double().square().sum()) for v in theirs.values())) ** 0.5


@pytest.mark.parametrize("case", PAIRS, ids=str)
@pytest.mark.slow
def test_an_adapter_goes_on_on_another_layout(case, ranks, checkpoints, tmp_path):
    check(case, ranks, checkpoints, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MUON_PAIRS, *MORE], ids=str)
def test_all_parameters_rare_targets_and_other_optimizers_go_on(case, ranks, checkpoints, tmp_path):
    check(case, ranks, checkpoints, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {}], ids=["adapter", "full"])
def test_a_score_head_goes_on_with_what_it_is_trained_with(lora, ranks, checkpoints, tmp_path):
    task, folder = resume_tasks.reward_model, checkpoints("qwen3")
    paused = ranks.run(task, DeviceMesh(tp=2, pp=2), folder, None, tmp_path, lora)[0]
    resumed = ranks.run(task, DeviceMesh(dp=2), folder, paused["path"], tmp_path)[0]
    assert "score.weight" in state_tensors(paused["path"])["exp_avg"]
    assert resumed["losses"] == pytest.approx(paused["losses"], abs=TOLERANCE)
    assert relative_l2(resumed["tensors"], paused["tensors"]) <= TOLERANCE
    check_same_state(Path(paused["path"]), Path(resumed["path"]))


@pytest.mark.parametrize("mesh", [ONE, DeviceMesh(dp=2, tp=2)], ids=["1", "dp2-tp2"])
@pytest.mark.parametrize("lora", [LORA | {"lora_dropout": 0.1}, {}], ids=["lora", "full"])
def test_on_one_layout_everything_is_bit_for_bit(mesh, lora, ranks, checkpoints, tmp_path):
    check_bit_for_bit(mesh, checkpoints("qwen3"), lora, ADAMW, ranks, tmp_path)


@pytest.mark.parametrize(
    ("family", "mesh", "lora", "optimizer"),
    [
        ("qwen3", DeviceMesh(pp=2), LORA, ADAMW),
        ("qwen3", DeviceMesh(cp=2), LORA, ADAMW),
        ("qwen3_moe", DeviceMesh(dp=2, ep=2), LORA, ADAMW),
        ("qwen3_moe", DeviceMesh(dp=2, ep=2), {}, ADAMW),
        ("qwen3", DeviceMesh(dp=2), LORA, MUON),
        ("qwen3", DeviceMesh(tp=2), {}, MUON),
    ],
    ids=["pp2", "cp2", "ep2-lora", "ep2-full", "dp2-Muon", "tp2-full-Muon"],
)
@pytest.mark.slow
def test_other_layouts_and_optimizers_are_bit_for_bit_too(
    family, mesh, lora, optimizer, ranks, checkpoints, tmp_path
):
    check_bit_for_bit(mesh, checkpoints(family), lora, optimizer, ranks, tmp_path)


def check_bit_for_bit(mesh, folder, lora, optimizer, ranks, tmp_path):
    result = ranks.run(
        resume_tasks.go_on_in_one_process,
        mesh,
        folder,
        lora,
        BATCHES[:6],
        3,
        tmp_path,
        optimizer,
    )[0]
    whole = result["straight"]
    for part in ("resumed", "paused"):
        assert result[part]["losses"] == whole["losses"][3:]
        assert result[part]["norms"] == whole["norms"][3:]
        assert result[part]["rates"] == whole["rates"][3:]
        tensors = result[part]["tensors"]
        assert all(torch.equal(tensors[name], value) for name, value in whole["tensors"].items())


PAUSES = [
    ("qwen3", LORA, DeviceMesh(dp=2, tp=2), ONE),
    ("qwen3", LORA, ONE, DeviceMesh(tp=2, pp=2)),
    ("qwen3_tied", {}, DeviceMesh(dp=2, pp=2), DeviceMesh(dp=4, fsdp=2)),
    ("qwen3_tied", {}, DeviceMesh(dp=4, fsdp=2), DeviceMesh(dp=2, pp=2)),
]


@pytest.mark.parametrize("reduce", [False, True], ids=["summed", "clipped"])
@pytest.mark.parametrize(("family", "lora", "first", "second"), PAUSES)
def test_gradients_that_were_not_stepped_on_are_kept(
    family, lora, first, second, reduce, ranks, checkpoints, tmp_path
):
    folder = checkpoints(family)
    paused = ranks.run(
        resume_tasks.pause_between_calls, first, folder, lora, BATCHES, tmp_path, reduce
    )[0]
    resumed = ranks.run(
        resume_tasks.resume_between_calls, second, folder, paused["path"], BATCHES, reduce
    )[0]
    assert resumed["norm"] == pytest.approx(paused["norm"], rel=TOLERANCE)
    assert relative_l2(resumed["tensors"], paused["tensors"]) <= TOLERANCE


def test_without_the_optimizer_weights_and_data_position_are_kept(ranks, checkpoints, tmp_path):
    result = ranks.run(
        resume_tasks.weights_and_position, DeviceMesh(tp=2), checkpoints("qwen3"), BATCHES, tmp_path
    )[0]
    assert result["place"] == {"cur_step": 1, "consumed_train_samples": 9}
    assert result["counters"] == [{}]
    assert all(torch.equal(result["resumed"][k], v) for k, v in result["saved"].items())


def test_each_adapter_of_a_run_is_saved_and_resumed_by_its_name(ranks, checkpoints, tmp_path):
    result = ranks.run(
        resume_tasks.two_saved_adapters,
        DeviceMesh(tp=2),
        checkpoints("qwen3"),
        BATCHES[:3],
        tmp_path,
    )[0]
    assert result["a"]["cur_step"] == 2
    assert result["b"]["cur_step"] == 1
    for name in "ab":
        paused, resumed = result[f"{name} paused"], result[f"{name} resumed"]
        assert all(torch.equal(resumed[key], value) for key, value in paused.items())


def test_a_state_that_does_not_fit_is_refused_before_anything_changes(ranks, checkpoints, tmp_path):
    result = ranks.run(
        resume_tasks.refusals,
        DeviceMesh(dp=2),
        checkpoints("qwen3"),
        checkpoints("qwen2"),
        BATCHES[0],
        tmp_path,
    )
    texts = {
        "base": ("CheckpointError", "another base model"),
        "lora": ("CheckpointError", "r: saved 4, here 2"),
        "sgd": ("ConfigError", "the optimizer AdamW, but SGD is set here"),
        "constant": ("ConfigError", "ConstantWarmupScheduler is set here"),
        "everything": ("CheckpointError", "of a LoRA adapter, but all parameters"),
        "bare": ("CheckpointError", "no training state"),
    }
    for on_rank in result:
        for case, (kind, text) in texts.items():
            kinds, message = on_rank[case]
            assert kind in kinds, case
            assert text in message, message
            assert on_rank.get(f"{case} unchanged", True)


def test_a_damaged_file_is_refused_and_the_one_before_is_used_when_asked(
    ranks, checkpoints, tmp_path
):
    result = ranks.run(
        resume_tasks.damaged, DeviceMesh(dp=2), checkpoints("qwen3"), BATCHES[:3], tmp_path
    )
    for on_rank in result:
        kinds, text = on_rank["error"]
        assert "CheckpointError" in kinds
        assert "altered" in text
        assert "step-3/state/exp_avg/model-00001-of-00001.safetensors" in text
        assert f"the one before is complete: {tmp_path / 'step-2'}" in text
        assert on_rank["trained"] == []
        assert on_rank["place"]["cur_step"] == 2


def test_a_save_in_the_background_holds_what_was_there_and_tells_of_failure_later(
    ranks, checkpoints, tmp_path
):
    for on_rank in ranks.run(
        resume_tasks.background, DeviceMesh(dp=2), checkpoints("qwen3"), BATCHES[0], tmp_path
    ):
        assert on_rank["same"]
        assert on_rank["started"] is None
        kinds, text = on_rank["surfaced"]
        assert "ExportError" in kinds
        assert "in the background failed" in text
        assert on_rank["once"] is None


def test_tensors_come_together_when_a_batch_holds_one_only(ranks, checkpoints):
    result = ranks.run(
        resume_tasks.gathered_in_small_batches, DeviceMesh(tp=2, ep=2), checkpoints("qwen3_moe")
    )[0]
    assert result["small"].keys() == result["whole"].keys()
    assert all(torch.equal(result["small"][k], value) for k, value in result["whole"].items())
