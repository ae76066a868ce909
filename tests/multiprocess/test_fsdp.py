"""Parameters sharded over the fsdp axis: the results of one rank, in a part of its memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatrain.parallel.layout import DeviceMesh
from megatrain.testing.ranks import RankPool
from tests.multiprocess import fsdp_tasks, tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.test_loading_memory import SHAPE
from tests.multiprocess.truth import (
    all_logps,
    hf_model,
    largest_adapter_difference,
    largest_difference,
    relative_difference,
    train,
)

pytestmark = pytest.mark.multiprocess

BATCHES = [random_batch(6, seed=seed) for seed in range(2)]
TOLERANCE = 1e-5
"""Float32 sums in another order; two steps at lr 1e-4 move log-probabilities by 1e-2."""

WHOLE = [
    ("qwen3", DeviceMesh(dp=2, fsdp=2), {}),
    ("qwen3", DeviceMesh(dp=2, fsdp=2), {"recompute": True}),
    ("qwen3_moe", DeviceMesh(dp=2, fsdp=2, tp=2), {}),
]
"""Pairs and a square: every kind of group that a rank has."""
WHOLE_SLOW = [
    ("qwen3", DeviceMesh(dp=3, fsdp=3), {}),
    ("qwen3", DeviceMesh(dp=4, fsdp=2), {}),
    ("qwen3", DeviceMesh(dp=4, fsdp=4), {}),
    ("qwen3", DeviceMesh(dp=2, fsdp=2, tp=2), {}),
    ("qwen3", DeviceMesh(dp=2, fsdp=2, cp=2), {}),
    ("qwen3", DeviceMesh(dp=2, fsdp=2, pp=2, vpp=2), {}),
    ("qwen3", DeviceMesh(dp=4, fsdp=2, tp=2), {"recompute": True}),
    ("qwen3_tied", DeviceMesh(dp=2, fsdp=2), {}),
    ("qwen3_tied", DeviceMesh(dp=2, fsdp=2, tp=2), {}),
    ("qwen3_tied", DeviceMesh(dp=2, fsdp=2, pp=2), {}),
    ("qwen3_moe", DeviceMesh(dp=2, fsdp=2), {}),
    ("qwen3_moe", DeviceMesh(dp=2, fsdp=2, tp=2, ep=2), {}),
    ("qwen3_moe", DeviceMesh(dp=2, fsdp=2, tp=2, etp=2), {}),
    ("qwen3_moe", DeviceMesh(dp=2, fsdp=2, cp=2, ep=2), {}),
    ("qwen3_moe", DeviceMesh(dp=2, fsdp=2, pp=2), {"recompute": True}),
]
LORA = [("qwen3", DeviceMesh(dp=2, fsdp=2), {})]
LORA_SLOW = [
    ("qwen3", DeviceMesh(dp=2, fsdp=2), {"recompute": True}),
    ("qwen3", DeviceMesh(dp=4, fsdp=2), {}),
    ("qwen3", DeviceMesh(dp=2, fsdp=2, tp=2), {}),
    ("qwen3", DeviceMesh(dp=2, fsdp=2, cp=2), {}),
    ("qwen3", DeviceMesh(dp=2, fsdp=2, pp=2, vpp=2), {}),
    ("qwen3_moe", DeviceMesh(dp=2, fsdp=2, tp=2, ep=2), {}),
    ("gpt_oss", DeviceMesh(dp=2, fsdp=2, tp=2), {}),
    ("deepseek_v3", DeviceMesh(dp=2, fsdp=2), {}),
]


def cases(fast, slow):
    """Return parameters with readable names; the second kind is marked slow."""
    marks = [()] * len(fast) + [pytest.mark.slow] * len(slow)
    return [
        pytest.param(
            family,
            mesh,
            options,
            marks=mark,
            id=f"{family}-{mesh.describe().replace('·', '-')}{'-recompute' * bool(options)}",
        )
        for (family, mesh, options), mark in zip([*fast, *slow], marks, strict=True)
    ]


@pytest.fixture(scope="module")
def trained_by_transformers(checkpoints):
    """Return (model, losses) for a family, trained once."""
    done = {}

    def trained(family: str):
        if family not in done:
            model = hf_model(checkpoints(family)).train()
            done[family] = model, train(model, list(model.parameters()), BATCHES)
        return done[family]

    return trained


@pytest.fixture(scope="module")
def on_one_rank(ranks, checkpoints, tmp_path_factory):
    """Return the report of one rank, made once for each family, task and options."""
    done = {}

    def report(task, family: str, *args):
        if (task, family) not in done:
            out = str(tmp_path_factory.mktemp("one"))
            done[task, family] = ranks.run(task, None, checkpoints(family), BATCHES, *args, out)[0]
        return done[task, family]

    return report


@pytest.mark.parametrize(("family", "mesh", "options"), cases(WHOLE, WHOLE_SLOW))
def test_a_sharded_model_is_trained_as_transformers_and_one_rank_train_it(
    family, mesh, options, ranks, checkpoints, trained_by_transformers, on_one_rank, tmp_path
):
    model, losses = trained_by_transformers(family)
    expected = on_one_rank(fsdp_tasks.train_by_halves, family, {})
    report = ranks.run(
        fsdp_tasks.train_by_halves, mesh, checkpoints(family), BATCHES, options, str(tmp_path)
    )[0]
    assert largest_difference(report["before"], expected["before"]) <= TOLERANCE
    assert report["losses"] == pytest.approx(losses, abs=TOLERANCE)
    assert report["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)
    assert largest_difference(report["logps"], all_logps(model.eval(), BATCHES[0])) <= TOLERANCE
    assert largest_adapter_difference(report["tensors"], expected["tensors"]) <= TOLERANCE

    written = {}
    for shard in Path(report["saved"]).glob("*.safetensors"):
        written |= load_file(shard)
    assert written.keys() == report["tensors"].keys()
    assert all(torch.equal(written[name], value) for name, value in report["tensors"].items())


@pytest.mark.parametrize(("family", "mesh", "options"), cases(LORA, LORA_SLOW))
def test_an_adapter_on_a_sharded_base_is_that_of_one_rank(
    family, mesh, options, ranks, checkpoints, on_one_rank, tmp_path
):
    expected = on_one_rank(fsdp_tasks.train_adapter, family, {})
    report = ranks.run(
        fsdp_tasks.train_adapter, mesh, checkpoints(family), BATCHES, options, str(tmp_path)
    )[0]
    assert relative_difference(report["gradient"], expected["gradient"]) <= TOLERANCE
    assert report["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert report["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)
    assert largest_difference(report["logps"], expected["logps"]) <= TOLERANCE
    assert largest_adapter_difference(report["adapter"], expected["adapter"]) <= TOLERANCE


@pytest.mark.parametrize("lora", [{}, tasks.LORA], ids=["all parameters", "adapter"])
def test_between_steps_a_rank_keeps_half_of_what_two_ranks_shard(lora, ranks, checkpoints):
    one, *_ = ranks.run(fsdp_tasks.kept_entries, None, checkpoints("qwen3"), BATCHES[0], lora)
    assert one["local"] == one["whole"]
    mesh = DeviceMesh(dp=2, fsdp=2)
    reports = ranks.run(fsdp_tasks.kept_entries, mesh, checkpoints("qwen3"), BATCHES[0], lora)
    assert sum(report["local"] for report in reports) == one["whole"]
    for report in reports:
        assert report["whole"] == one["whole"]
        # All sizes here are even, so that nothing is padding.
        assert report["local"] == one["whole"] // 2
        assert report["gathered"] == 0
        assert report["masters"] == report["moments"] == one["masters"] // 2
        assert report["sums"] == (one["sums"] if lora else one["sums"] // 2)


@pytest.mark.parametrize(
    "mesh",
    [DeviceMesh(dp=3, fsdp=3), DeviceMesh(dp=4, fsdp=2, tp=2)],
    ids=["fsdp3", "dp4-fsdp2-tp2"],
)
def test_flat_buffers_are_of_whole_parameters_and_go_back_bit_for_bit(mesh, ranks, checkpoints):
    for report in ranks.run(fsdp_tasks.flat_buffers, mesh, checkpoints("qwen3_moe"), BATCHES[0]):
        assert report == {"same": True, "equal": True, "covered": True}


def test_a_backward_that_failed_leaves_nothing_behind(ranks, checkpoints):
    mesh = DeviceMesh(dp=2, fsdp=2)
    task = fsdp_tasks.steps_around_an_error
    plain, around = ranks.run(task, mesh, checkpoints("qwen3"), BATCHES)[0]
    assert around == plain


@pytest.mark.slow
def test_a_pass_before_training_does_not_change_in_which_dtype_gradients_are_summed(
    ranks, checkpoints
):
    mesh = DeviceMesh(dp=4, fsdp=4)  # two bf16 numbers have the same sum in either dtype
    cold, warm = ranks.run(fsdp_tasks.bf16_norms, mesh, checkpoints("qwen3"), BATCHES[0])[0]
    assert warm == cold
    expected, _ = ranks.run(fsdp_tasks.bf16_norms, None, checkpoints("qwen3"), BATCHES[0])[0]
    # Every gradient is rounded to bf16 (2^-9) on the way, once on each rank and once in its sum.
    assert cold == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (DeviceMesh(dp=4, fsdp=2), DeviceMesh(tp=2)),
        (DeviceMesh(pp=2), DeviceMesh(dp=2, fsdp=2, tp=2)),
        (DeviceMesh(dp=2, fsdp=2), DeviceMesh(dp=3, fsdp=3)),
    ],
    ids=lambda mesh: mesh.describe().replace("·", "-"),
)
def test_a_run_goes_on_from_and_to_sharded_parameters(before, after, ranks, checkpoints, tmp_path):
    batches = [random_batch(6, seed=seed) for seed in range(3)]
    folder = checkpoints("qwen3_moe")
    straight = ranks.run(fsdp_tasks.save_and_go_on, before, folder, batches, str(tmp_path))[0]
    resumed = ranks.run(fsdp_tasks.resume, after, folder, straight["path"], batches[1:])[0]
    assert resumed["place"] == {"cur_step": 1, "consumed_train_samples": 6}
    assert resumed["losses"] == pytest.approx(straight["losses"], rel=TOLERANCE)
    assert largest_adapter_difference(resumed["tensors"], straight["tensors"]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_while_loading_a_rank_holds_its_shards_and_one_whole_unit(checkpoints):
    pool = RankPool(2)  # ranks whose allocators hold no pages to use again
    folder = checkpoints("qwen3", **SHAPE)
    mesh = DeviceMesh(dp=2, fsdp=2)
    try:
        reports = pool.run(fsdp_tasks.loading_growth, mesh, folder, timeout_s=400.0)
    finally:
        pool.close()
    for report in reports:
        print({name: f"{value / 1e6:.0f} MB" for name, value in report.items()})
        assert report["kept"] <= 0.51 * report["whole"]
        # Beside the unit: the part of a tensor that is being read.
        assert report["kept"] * 0.9 <= report["growth"] <= report["kept"] + 2 * report["unit"]
