"""The plan of a batch: every datum once, budgets kept, labels where they belong."""

import random

import pytest

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess.data import num_labels, random_batch
from tests.unit.train import batch_tasks

pytestmark = pytest.mark.multiprocess


def random_case(rng):
    case = {
        "lengths": [rng.randint(1, 300) for _ in range(rng.randint(1, 40))],
        "num_ranks": rng.randint(1, 8),
        "multiple": rng.choice([1, 1, 2, 4]),
    }
    kind = rng.choice(["tokens", "data", "neither"])
    if kind == "tokens":
        case["max_tokens"] = rng.choice([1, 100, 299, 1000, 100_000])
    elif kind == "data":
        case["max_data"] = rng.randint(1, 10)
    return case


def test_bins_hold_every_datum_once_within_the_budget_and_come_out_even(ranks):
    rng = random.Random(0)
    cases = [random_case(rng) for _ in range(300)]
    for case, bins in zip(cases, ranks.run(batch_tasks.plan_all, None, cases)[0], strict=True):
        lengths = case["lengths"]
        assert sorted(i for b in bins for i in b) == list(range(len(lengths))), case
        assert len(bins) % (case["num_ranks"] * case["multiple"]) == 0, case
        if "max_data" in case:
            assert max(map(len, bins)) <= case["max_data"], case
            continue
        budget = case.get("max_tokens", 4096)
        over = [b for b in bins if sum(lengths[i] for i in b) > budget]
        assert all(len(b) == 1 for b in over), case


def test_bins_are_about_as_full_as_each_other(ranks):
    rng = random.Random(1)
    lengths = [rng.randint(1, 300) for _ in range(200)]
    case = {"lengths": lengths, "num_ranks": 4, "max_tokens": 4096}
    (bins,) = ranks.run(batch_tasks.plan_all, None, [case])[0]
    loads = [sum(lengths[i] for i in b) for b in bins]
    # Longest first to the least full bin: no two differ by more than the longest datum.
    assert max(loads) - min(loads) <= max(lengths)


def test_the_same_batch_gives_the_same_plan(ranks):
    case = {"lengths": [5, 5, 5, 9, 1, 9], "num_ranks": 2, "max_tokens": 10}
    plans = ranks.run(batch_tasks.plan_all, DeviceMesh(dp=2), [case, case])
    assert plans[0][0] == plans[0][1] == plans[1][0] == plans[1][1]


MESHES = [
    DeviceMesh(),
    DeviceMesh(dp=2),
    DeviceMesh(tp=2),
    DeviceMesh(cp=2),
    DeviceMesh(tp=2, cp=2),
    DeviceMesh(pp=2, vpp=2),
    DeviceMesh(dp=2, cp=4),
]


@pytest.mark.parametrize("options", [{}, {"max_tokens": 64}, {"max_data": 2}], ids=str)
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: mesh.describe().replace("·", "-"))
def test_every_label_is_predicted_once_from_the_token_before_it(mesh, options, ranks):
    batches = [random_batch(size, seed=size) for size in (1, 2, 3, 7, 12)]
    reports = ranks.run(batch_tasks.pack_with, mesh, batches, options)
    for number, batch in enumerate(batches):
        starts = [sum(len(d["input_ids"]) for d in batch[:i]) for i in range(len(batch))]
        expected = {
            start + t: (datum["input_ids"][t - 1], t - 1, datum["labels"][t])
            for start, datum in zip(starts, batch, strict=True)
            for t in range(1, len(datum["labels"]))
            if datum["labels"][t] != -100
        }
        found = {}
        for report in reports:
            for pack in report[number]["packs"]:
                for i, target, place, slot in zip(
                    pack["index"], pack["targets"], pack["places"], pack["slots"], strict=True
                ):
                    if slot >= 0:
                        found[slot] = (pack["ids"][i], pack["positions"][i], target)
                    assert (place >= 0) == (slot >= 0)
        assert found == expected
        assert {r[number]["num_labels"] for r in reports} == {num_labels(batch)}
        assert {r[number]["num_slots"] for r in reports} == {
            sum(len(d["input_ids"]) for d in batch)
        }


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: mesh.describe().replace("·", "-"))
def test_micro_batches_fit_what_the_layout_divides_by(mesh, ranks):
    batches = [random_batch(size, seed=size) for size in (1, 2, 3, 7, 12)]
    reports = ranks.run(batch_tasks.pack_with, mesh, batches, {"max_tokens": 100})
    for number, batch in enumerate(batches):
        counts = {len(report[number]["packs"]) for report in reports}
        assert len(counts) == 1  # every rank takes part in as many pipeline steps
        if mesh.vpp > 1:
            assert counts.pop() % mesh.pp == 0
            assert len({len(p["ids"]) for r in reports for p in r[number]["packs"]}) == 1
        for report in reports:
            for pack in report[number]["packs"]:
                assert len(pack["ids"]) % mesh.tp == 0
                assert len(pack["ids"]) == sum(q for _, q, _, _ in pack["segments"])
        padded = sum(len(p["ids"]) for r in reports for p in r[number]["packs"])
        real = sum(len(d["input_ids"]) for d in batch) * mesh.tp * mesh.pp
        # Never the longest datum's length for every datum, only what TP and CP divide by.
        if mesh.vpp == 1:
            packs = sum(len(r[number]["packs"]) for r in reports)
            each = 2 * mesh.cp
            assert padded <= real + mesh.tp * mesh.pp * each * len(batch) + packs * each * mesh.tp


def test_without_parallelism_there_is_no_padding_at_all(ranks):
    batch = random_batch(9, seed=1)
    (report,) = ranks.run(batch_tasks.pack_with, None, [batch], {"max_tokens": 1000})[0]
    assert sum(len(pack["ids"]) for pack in report["packs"]) == report["num_slots"]
