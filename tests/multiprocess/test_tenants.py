"""Many adapters in one batch: each gets what it would get alone."""

import numpy as np
import pytest

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import tenant_tasks
from tests.multiprocess.truth import largest_adapter_difference, largest_difference

pytestmark = [pytest.mark.multiprocess, pytest.mark.api]

SAME = 1e-6
"""Of the largest entry: the same sums in float32, in products of other shapes."""
GRADIENTS = 3e-6
"""Of the largest entry: float32 sums in another order; processors differ, up to 1.7e-6 was seen."""
SPLIT_EXPERTS = 1e-5
"""Where a router's scores and experts are summed over ranks: an adapter of rank 1 on all linears
differs by 5e-6 then, and by 2e-6 between two packings of its data alone."""

MESHES = {
    "1": DeviceMesh(),
    "tp2": DeviceMesh(tp=2),
    "cp2": DeviceMesh(cp=2),
    "pp2": DeviceMesh(pp=2),
    "dp2": DeviceMesh(dp=2),
    "tp2-pp2": DeviceMesh(tp=2, pp=2),
    "pp2-vpp2": DeviceMesh(pp=2, vpp=2),
}
MOE = {
    "1": DeviceMesh(),
    "tp2": DeviceMesh(tp=2),
    "dp2-ep2": DeviceMesh(dp=2, ep=2),
    "tp2-ep2": DeviceMesh(tp=2, ep=2),
    "tp2-etp2": DeviceMesh(tp=2, etp=2),
}
CASES = [("qwen3", name, {}) for name in MESHES] + [
    ("qwen3", "1", {"max_tokens_per_microbatch": 64}),
    ("qwen3", "tp2-pp2", {"max_tokens_per_microbatch": 64, "recompute": True}),
    *[("qwen3_moe", name, {"max_tokens_per_microbatch": 128}) for name in MOE],
    ("qwen3_moe", "tp2-ep2", {"max_tokens_per_microbatch": 64, "recompute": True}),
]


@pytest.mark.parametrize(
    ("family", "layout", "options"), CASES, ids=[f"{f}-{m}-{len(o)}" for f, m, o in CASES]
)
def test_eight_tenants_share_a_pass_and_each_gets_its_own_gradient(
    family, layout, options, ranks, checkpoints
):
    mesh = (MESHES if family == "qwen3" else MOE)[layout]
    names = list(tenant_tasks.TENANTS)
    if family == "qwen3_moe" and mesh.etp > 1:
        names.remove("d")
    folder = checkpoints(family)
    together = ranks.run(tenant_tasks.gradients_together, mesh, folder, names, options)[0]
    alone = ranks.run(tenant_tasks.gradients_alone, mesh, folder, names, options)[0]
    for name in names:
        loss, logps, gradients, only, statistics, squares = together[name]
        expected = alone[name]
        assert loss == pytest.approx(expected[0], abs=1e-6, rel=1e-6), name
        for ours, theirs in ((logps, expected[1]), (only, expected[3])):
            largest = max(float(np.abs(each).max()) for each in theirs)
            assert largest_difference(ours, theirs) <= SAME * largest, name
        largest = max(float(each.abs().max()) for each in expected[2].values())
        bound = SPLIT_EXPERTS if family == "qwen3_moe" and mesh.world_size > 1 else GRADIENTS
        assert largest_adapter_difference(gradients, expected[2]) <= bound * largest, name
        assert statistics == pytest.approx(expected[4], abs=1e-5), name
        assert squares == expected[5], name
        assert any(np.asarray(value).any() for value in gradients.values()), name


def test_deleting_an_adapter_leaves_the_others_bit_for_bit(ranks, checkpoints):
    reports = ranks.run(tenant_tasks.deletion, DeviceMesh(tp=2), checkpoints("qwen3"))
    before, after, names, error = reports[0]
    assert names == ["a", "c"]
    for name in names:
        assert before[name].keys() == after[name].keys()
        assert all(np.array_equal(before[name][k], after[name][k]) for k in before[name])
    assert "'b'" in error[1]


def test_one_tenants_bad_numbers_are_its_own(ranks, checkpoints):
    for good, bad, errors, error in ranks.run(
        tenant_tasks.isolation, DeviceMesh(pp=2), checkpoints("qwen3")
    )[:1]:
        assert errors == ["b"]
        assert "not a finite number" in error
        assert good["together"] == good["alone"]
        assert bad["before"] == bad["after"]


@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(dp=2)], ids=["1", "dp2"])
def test_tenants_that_cannot_share_a_pass_have_one_of_their_own(mesh, ranks, checkpoints):
    together, alone = ranks.run(tenant_tasks.unlike, mesh, checkpoints("qwen3"))[0]
    assert together == pytest.approx(alone, abs=1e-6)


def test_bad_calls_for_several_adapters_are_refused_before_anything_changes(ranks, checkpoints):
    errors, before, after = ranks.run(tenant_tasks.bad_calls, None, checkpoints("qwen3"))[0]
    for case, (text, kind) in tenant_tasks.BAD_CALLS.items():
        kinds, message = errors[case]
        assert kind in kinds, (case, kinds)
        assert text in message, (case, message)
    assert before == after


@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(tp=2, dp=2)], ids=["1", "dp2-tp2"])
def test_adapters_that_leave_the_device_come_back_as_they_were(mesh, ranks, checkpoints):
    folder = checkpoints("qwen3")
    expected = ranks.run(tenant_tasks.resident_run, mesh, folder, {})[0]
    for options in ({"max_loras": 2}, {"max_loras": 1, "max_cpu_loras": 1}):
        found = ranks.run(tenant_tasks.resident_run, mesh, folder, options)[0]
        assert found[5] == expected[5]
        assert found[0] == expected[0]
        assert found[1] == expected[1]
        for name, state in expected[2].items():
            assert all(np.array_equal(found[2][name][key], state[key]) for key in state), name
            # The last pass is one of all adapters, or several of fewer.
            largest = max(float(each.abs().max()) for each in expected[3][name].values())
            difference = largest_adapter_difference(found[3][name], expected[3][name])
            assert difference <= SAME * largest, name
        assert found[4] == pytest.approx(expected[4], rel=1e-6)


def test_memory_for_adapters_is_refused_where_it_has_no_effect(ranks, checkpoints):
    error = ranks.run(tenant_tasks.bad_memory, None, checkpoints("qwen3"))[0]
    assert "max_cpu_loras=1 has no effect without max_loras" in error[1]


@pytest.mark.parametrize("options", [{"max_loras": 1}, {}], ids=["in turns", "alone"])
@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(dp=2)], ids=["1", "dp2"])
def test_a_refused_pass_changes_no_adapter_however_it_would_be_split(
    mesh, options, ranks, checkpoints
):
    for before, after, error in ranks.run(
        tenant_tasks.refused, mesh, checkpoints("qwen3"), options
    )[:1]:
        assert "adapter 'b'" in error[1]
        assert before == after


@pytest.mark.local_only
@pytest.mark.parametrize("options", [{"max_loras": 1}, {}], ids=["in turns", "alone"])
def test_data_that_one_rank_alone_refuses_are_refused_by_all(options, ranks, checkpoints):
    for kinds, text in ranks.run(
        tenant_tasks.refused_by_one, DeviceMesh(dp=2), checkpoints("qwen3"), options
    ):
        assert "DataError" in kinds
        assert "adapter 'b'" in text or "refused their batch" in text
