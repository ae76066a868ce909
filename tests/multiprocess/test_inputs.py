"""Rows of datasets and per-call inputs: what is the same, and what is refused before it counts."""

import numpy as np
import pytest

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import input_tasks

pytestmark = [pytest.mark.multiprocess, pytest.mark.api]

MESHES = [None, DeviceMesh(dp=2), DeviceMesh(tp=2, cp=2)]
TOLERANCE = 1e-5
"""float32; another packing adds up in another order."""


@pytest.mark.local_only
@pytest.mark.parametrize("mesh", MESHES, ids=["1", "dp2", "tp2-cp2"])
def test_a_packed_row_and_lazy_rows_equal_plain_data(mesh, ranks, checkpoints):
    reports = ranks.run(input_tasks.row_report, mesh, checkpoints("qwen3"))
    for report in reports:
        for loss, logps in zip(report["loss"], report["logps"], strict=True):
            assert loss == pytest.approx(report["loss"][0], abs=TOLERANCE)
            np.testing.assert_allclose(logps, report["logps"][0], atol=TOLERANCE)
    if mesh is not None and mesh.dp == 2:
        first, second = (report["read"] for report in reports)
        assert [a != b for a, b in zip(first, second, strict=True)] == [True] * 6


MESSAGES = {
    "unknown": "does not take advantages",
    "missing": "needs advantages, and datum 0 has none",
    "too few": "advantages must have one entry for each of 6 data: got 5",
    "wrong length": "advantages of datum 0 must have one entry for each of",
    "not finite": "advantages of datum 0 has a value that is not finite",
    "half": "old_logps must have one entry for each of 6 data: got 1",
    "odd": "groups of 2",
    "packed": "counts sequences",
    "teacher": "teacher_tokens of datum 0 must be in [0, 512): found 512",
    "lie": "datum 0 says that it has",
    "positions": "position_ids of datum 0 must count",
    "size": "micro_batch_size must be an integer >= 1: 0",
    "twice": "has a token twice for one label",
    "scalar": "advantages must have one entry for each of 6 data",
    "unread": "the file is gone",
    "name": "GRPOLoss",
    "option": "epsilon",
}


@pytest.mark.local_only
@pytest.mark.parametrize("mesh", [None, DeviceMesh(dp=2, pp=2)], ids=["1", "dp2-pp2"])
def test_bad_inputs_are_refused_on_every_rank_and_leave_no_trace(mesh, ranks, checkpoints):
    folder = checkpoints("qwen3")
    expected = ranks.run(input_tasks.good, mesh, folder)[0]
    for errors, *after in ranks.run(input_tasks.refusals, mesh, folder):
        assert errors.keys() == MESSAGES.keys()
        for case, error in errors.items():
            assert error is not None, case
            kinds, text = error
            if case != "unread":
                kind = "ConfigError" if case in ("name", "option", "size") else "DataError"
                assert kind in kinds, (case, kinds)
            assert MESSAGES[case] in text or "refused their batch" in text, (case, text)
        assert after == pytest.approx(list(expected), abs=TOLERANCE)


def test_dropout_is_a_function_of_seed_step_and_pass(ranks, checkpoints):
    mesh = DeviceMesh(tp=2)
    first = ranks.run(input_tasks.with_dropout, mesh, checkpoints("qwen3"))[0]
    again = ranks.run(input_tasks.with_dropout, mesh, checkpoints("qwen3"))[0]
    assert first == again
    assert len(set(first)) == 3
