"""Large batches reach only the ranks that read them, and give what small ones give."""

import numpy as np
import pytest

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import scattered_tasks

pytestmark = pytest.mark.multiprocess

MESHES = [DeviceMesh(dp=2), DeviceMesh(dp=2, tp=2), DeviceMesh(dp=2, pp=2), DeviceMesh(dp=4)]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: mesh.describe().replace("·", "-"))
@pytest.mark.slow
def test_a_scattered_pass_equals_one_whose_rows_all_ranks_have(mesh, ranks, checkpoints):
    reports = ranks.run(scattered_tasks.passes, mesh, checkpoints("qwen3"))
    for name, (whole, scattered) in reports[0]["outputs"].items():
        for ours, theirs in zip(scattered[0], whole[0], strict=True):
            assert np.array_equal(ours, theirs), name
        assert scattered[1:] == whole[1:], name
    total = reports[0]["total"]
    received = [report["received"] for report in reports]
    assert received[0] == 0
    # Every rank is sent its own share of the rows: about a half, or a quarter, of all bytes.
    assert all(0.5 * total / mesh.dp < each < 1.5 * total / mesh.dp for each in received[1:])


def test_what_is_wrong_with_a_row_is_said_as_if_all_ranks_had_it(ranks, checkpoints):
    for cases in ranks.run(scattered_tasks.errors, DeviceMesh(dp=2), checkpoints("qwen3")):
        for name, (whole, scattered) in cases.items():
            assert scattered is not None, name
            assert scattered[0][0] == whole[0][0], name
