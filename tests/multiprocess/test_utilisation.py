"""MFU of training calls, as calculate_metric gives it."""

import json

import pytest

from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.config.estimate.work import Work
from megatrain.parallel.layout import DeviceMesh
from megatrain.rl.metrics import ThroughputMetric
from tests.multiprocess.data import random_batch
from tests.multiprocess.tasks import LORA, mfu_report

pytestmark = pytest.mark.multiprocess

SEQUENCES = random_batch(5, seed=3)
PACKED = {
    "input_ids": [i for each in SEQUENCES[3:] for i in each["input_ids"]],
    "lengths": [len(each["input_ids"]) for each in SEQUENCES[3:]],
}
BATCH = [*SEQUENCES[:3], PACKED]


@pytest.mark.parametrize("lora", [LORA, {}], ids=["lora", "full"])
@pytest.mark.parametrize(
    "mesh",
    [DeviceMesh(), DeviceMesh(tp=2, cp=2), DeviceMesh(dp=2, pp=2)],
    ids=lambda mesh: mesh.describe().replace("·", "-"),
)
def test_mfu_is_what_the_model_needs_over_what_the_devices_could_do(mesh, lora, ranks, checkpoints):
    """Against parameters counted in the checkpoint, and the metric that is fed with lengths."""
    folder = checkpoints("qwen3")
    metrics, peak = ranks.run(mfu_report, mesh, folder, lora, BATCH)[0]
    config = json.loads((folder / "config.json").read_text())
    expected = ThroughputMetric(
        num_devices=mesh.world_size,
        work=Work.of(SafetensorsFolder(folder).shapes(), config),
        peak_flops=peak,
        is_frozen=bool(lora),
    )
    expected.accumulate(BATCH, seconds=metrics["tokens"] / metrics["tokens_per_second"])
    assert metrics["mfu"] == pytest.approx(expected.calculate()["mfu"], rel=1e-6)
    assert peak > 1e8
