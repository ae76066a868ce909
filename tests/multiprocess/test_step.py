"""One training step: what packing, micro-batches and accumulation must not change."""

import math

import numpy as np
import pytest
import torch

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import tasks
from tests.multiprocess.data import num_labels, random_batch
from tests.multiprocess.truth import (
    largest_adapter_difference,
    largest_difference,
    relative_difference,
)

pytestmark = [pytest.mark.multiprocess, pytest.mark.api]

SAME = 1e-6
"""The same sums in another order; single values are about 1, so this is a few units in the last
place."""

BATCH = random_batch(8, seed=3)
MESHES = [
    DeviceMesh(),
    DeviceMesh(cp=2),
    DeviceMesh(tp=2),
    DeviceMesh(dp=2),
    DeviceMesh(pp=2),
    DeviceMesh(pp=2, vpp=2),
]


def mesh_id(mesh: DeviceMesh) -> str:
    return mesh.describe().replace("·", "-")


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(cp=2), DeviceMesh(tp=2)], ids=mesh_id)
def test_packing_does_not_leak(mesh, family, ranks, checkpoints):
    report = ranks.run(tasks.logps_alone_and_packed, mesh, checkpoints(family), BATCH)[0]
    # A leak shows as 1e-2 and more; values are up to 20, so 2e-6 is one unit in the last place.
    assert largest_difference(report["packed"], report["alone"]) <= 4 * SAME
    assert largest_difference(report["reversed"], report["alone"]) <= 4 * SAME


@pytest.fixture(scope="module")
def whole(ranks, checkpoints):
    """What one rank with one pack reports, by family."""
    return {
        family: ranks.run(
            tasks.gradient_of,
            DeviceMesh(),
            checkpoints(family),
            [BATCH],
            {"max_tokens_per_microbatch": 100_000},
        )[0]
        for family in ("qwen3", "qwen3_moe")
    }


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens_per_microbatch": 64},
        {"max_tokens_per_microbatch": 1},
        {"micro_batch_size": 1},
        {"micro_batch_size": 3},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_the_size_of_micro_batches_does_not_change_gradients(
    family, options, whole, ranks, checkpoints
):
    report = ranks.run(tasks.gradient_of, None, checkpoints(family), [BATCH], options)[0]
    assert relative_difference(report["gradient"], whole[family]["gradient"]) <= SAME
    assert largest_difference(report["logps"], whole[family]["logps"]) <= 4 * SAME


@pytest.mark.parametrize("mesh", MESHES, ids=mesh_id)
def test_micro_batches_of_one_datum_give_the_gradient_of_one_pack(mesh, whole, ranks, checkpoints):
    options = {"micro_batch_size": 1}
    report = ranks.run(tasks.gradient_of, mesh, checkpoints("qwen3"), [BATCH], options)[0]
    # Another layout than the truth's: bounded as in test_layouts.
    assert relative_difference(report["gradient"], whole["qwen3"]["gradient"]) <= 1e-5


@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(tp=2), DeviceMesh(dp=2)], ids=mesh_id)
def test_accumulation_over_calls_does_not_change_gradients(mesh, ranks, checkpoints):
    calls = [BATCH[:1] + BATCH[1:3], BATCH[3:4], BATCH[4:]]
    folder = checkpoints("qwen3")
    one = ranks.run(tasks.gradient_of, mesh, folder, [BATCH])[0]
    many = ranks.run(tasks.gradient_of, mesh, folder, calls)[0]
    assert relative_difference(many["gradient"], one["gradient"]) <= SAME
    weighted = np.average(many["losses"], weights=many["tokens"])
    assert weighted == pytest.approx(one["losses"][0], abs=SAME)
    assert many["tokens"] == [num_labels(call) for call in calls]


@pytest.mark.parametrize(
    "mesh", [DeviceMesh(), DeviceMesh(tp=2), DeviceMesh(pp=2), DeviceMesh(cp=2)], ids=mesh_id
)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_recomputation_does_not_change_gradients(family, mesh, whole, ranks, checkpoints):
    options = {"recompute": True}
    report = ranks.run(tasks.gradient_of, mesh, checkpoints(family), [BATCH], options)[0]
    # The first pass runs without gradients and rounds a little differently: logps differ by 1e-6.
    assert relative_difference(report["gradient"], whole[family]["gradient"]) <= 1e-5


@pytest.mark.parametrize(
    "mesh",
    [
        DeviceMesh(),
        DeviceMesh(dp=2),
        DeviceMesh(dp=4, ep=4),
        DeviceMesh(tp=4),
        DeviceMesh(cp=4),
        DeviceMesh(pp=4),
        DeviceMesh(pp=2, vpp=2),
        DeviceMesh(dp=2, tp=2, ep=2),
    ],
    ids=mesh_id,
)
def test_a_batch_of_one_short_datum_trains_on_every_layout(mesh, ranks, checkpoints):
    batch = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    folder = checkpoints("qwen3_moe")
    one = ranks.run(tasks.gradient_of, None, folder, [batch])[0]
    report = ranks.run(tasks.gradient_of, mesh, folder, [batch])[0]
    assert report["tokens"] == [2]
    assert report["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert relative_difference(report["gradient"], one["gradient"]) <= 1e-5


def test_labels_are_the_inputs_where_none_are_given(ranks, checkpoints):
    with_labels = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    without = [{"input_ids": [3, 4, 5]}]
    folder = checkpoints("qwen3")
    reports = [ranks.run(tasks.gradient_of, None, folder, [b])[0] for b in (with_labels, without)]
    assert reports[0]["losses"] == reports[1]["losses"]


def test_the_loss_is_the_mean_over_label_tokens_and_logps_lie_at_their_labels(ranks, checkpoints):
    report = ranks.run(tasks.gradient_of, DeviceMesh(dp=2), checkpoints("qwen3"), [BATCH])[0]
    total = -sum(float(array.sum(dtype="float64")) for array in report["logps"])
    assert report["losses"][0] == pytest.approx(total / num_labels(BATCH), rel=1e-7)
    for datum, logps in zip(BATCH, report["logps"], strict=True):
        assert logps.dtype == np.float32
        assert logps.shape == (len(datum["input_ids"]),)
        has_label = np.array(datum["labels"]) != -100
        has_label[0] = False
        assert ((logps != 0) == has_label).all()


def test_gradient_accumulation_steps_acts_on_every_nth_call(ranks, checkpoints):
    batches = [random_batch(3, seed=seed) for seed in range(6)]
    folder = checkpoints("qwen3")
    report = ranks.run(tasks.steps_on_every_nth_call, None, folder, batches, 3)[0]
    # The warm-up's first step has a learning rate of zero.
    assert [norm is None for norm in report["norms"]] == [True, True, False, True, True, False]
    assert report["moved"] == [False, False, False, False, False, True]
    assert report["metrics"]["step"] == 2
    assert report["metrics"]["label_tokens"] == sum(map(num_labels, batches))
    merged = [[d for b in batches[:3] for d in b], [d for b in batches[3:] for d in b]]
    once = ranks.run(tasks.steps_on_every_nth_call, None, folder, merged, 1)[0]
    assert [n for n in report["norms"] if n] == pytest.approx(once["norms"], rel=1e-5)
    assert largest_adapter_difference(report["adapter"], once["adapter"]) <= 1e-5


def test_clip_step_zero_and_lr_step_alone_do_what_clip_grad_and_step_does(ranks, checkpoints):
    folder, batches = checkpoints("qwen3"), [random_batch(3, seed=seed) for seed in range(3)]
    single = ranks.run(tasks.step_singly, DeviceMesh(dp=2), folder, batches, 1.0)[0]
    joint = ranks.run(tasks.three_steps, DeviceMesh(dp=2), folder, tasks.LORA, batches)[0]
    assert largest_adapter_difference(single["adapter"], joint["adapter"]) == 0.0


@pytest.mark.parametrize("max_norm", [0.01, 0.0, math.inf])
@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(tp=2, pp=2)], ids=mesh_id)
def test_clipping_scales_the_global_norm(mesh, max_norm, ranks, checkpoints):
    report = ranks.run(tasks.sgd_step, mesh, checkpoints("qwen3"), BATCH, max_norm)[0]
    moved = [report["after"][name] - report["before"][name] for name in report["before"]]
    norm = math.sqrt(sum(float(delta.double().square().sum()) for delta in moved))
    assert norm == pytest.approx(max_norm if max_norm == 0.01 else report["norm"], rel=1e-3)
    assert report["norm"] > 0.01


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("ConstantWarmupScheduler", {"num_warmup_steps": 2}, [0, 0.5, 1, 1, 1]),
        (
            "LinearWarmupScheduler",
            {"num_warmup_steps": 1, "num_training_steps": 5},
            [0, 1, 0.75, 0.5, 0.25],
        ),
        (
            "CosineWarmupScheduler",
            {"num_warmup_steps": 0, "num_training_steps": 4},
            [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)],
        ),
    ],
    ids=["constant", "linear", "cosine"],
)
def test_schedules_warm_up_and_fall(kind, options, expected, ranks, checkpoints):
    mesh = DeviceMesh(pp=2)
    for rates in ranks.run(
        tasks.learning_rates, mesh, checkpoints("qwen3"), BATCH[:2], kind, options
    ):
        assert rates == pytest.approx([1e-3 * each for each in expected], abs=1e-12)


def test_dropout_changes_training_only_and_depends_on_the_seed(ranks, checkpoints):
    folder = checkpoints("qwen3")
    lora = tasks.LORA | {"lora_dropout": 0.5}
    runs = [
        ranks.run(tasks.dropout_outputs, None, folder, lora, BATCH[:3], seed=seed)[0]
        for seed in (1, 1, 2)
    ]
    assert largest_difference(runs[0]["train"], runs[1]["train"]) == 0.0
    assert largest_difference(runs[0]["train"], runs[0]["evaluate"]) > 1e-3
    assert not torch.equal(torch.tensor(runs[0]["train"][2]), torch.tensor(runs[2]["train"][2]))
