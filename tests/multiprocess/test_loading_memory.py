"""A rank's memory while it loads: its own parameters and little more."""

import pytest

from megatrain.parallel.layout import DeviceMesh
from megatrain.testing.ranks import RankPool
from tests.multiprocess import memory_tasks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.timeout(600)]

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32_768,
}
"""About 290 million parameters in few big tensors, so that a copy too many shows."""


@pytest.fixture
def new_ranks():
    """Ranks that have loaded nothing before, whose allocator holds no pages to use again."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "many files"])
@pytest.mark.parametrize(
    "mesh", [DeviceMesh(tp=2), DeviceMesh(pp=2), DeviceMesh()], ids=DeviceMesh.describe
)
def test_each_rank_grows_by_its_parameters_and_four_fused_ones_at_most(
    mesh, sharded, new_ranks, checkpoints
):
    folder = checkpoints("qwen3", **SHAPE)
    if sharded:
        folder = memory_tasks.split(folder)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) >= 1e9
    for report in new_ranks.run(memory_tasks.loading_growth, mesh, folder, timeout_s=400.0):
        allowed = report["parameters"] + 4 * report["largest"]
        print({name: f"{value / 1e6:.0f} MB" for name, value in report.items()})
        assert report["growth"] <= allowed
        # The growth is real: what was measured is not less than what must be there.
        assert report["growth"] >= 0.9 * report["parameters"]
