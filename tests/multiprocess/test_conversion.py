"""Hugging Face to Megatron's distributed checkpoints and back, against Megatron's own code."""

import pytest

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import conversion_tasks as tasks

pytestmark = pytest.mark.multiprocess

DENSE = [DeviceMesh(), DeviceMesh(tp=2), DeviceMesh(tp=2, pp=2), DeviceMesh(pp=4), DeviceMesh(tp=4)]
EXPERTS = [
    DeviceMesh(),
    DeviceMesh(tp=2, ep=2),
    DeviceMesh(dp=4, ep=4),
    DeviceMesh(tp=2, pp=2, ep=2),
    DeviceMesh(tp=2, etp=2),
    DeviceMesh(dp=2, tp=2, ep=2, etp=2),
]
LAYOUTS = {
    "qwen3": DENSE,
    "qwen3_tied": DENSE,
    "qwen2": DENSE[:3],
    "qwen3_moe": EXPERTS,
    "deepseek_v3": EXPERTS,
    "gpt_oss": EXPERTS[:4],
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "family", ["qwen3", "qwen3_moe", *map(slow, [*LAYOUTS][1:3] + [*LAYOUTS][4:])]
)
def test_what_goes_through_megatron_comes_back_byte_for_byte(family, ranks, checkpoints, tmp_path):
    folder = checkpoints(family)
    assert ranks.run(tasks.round_trip, None, folder, tmp_path, LAYOUTS[family]) == [[]]


@pytest.mark.parametrize(
    ("family", "saved", "loaded"),
    [
        ("qwen3", DeviceMesh(tp=2, pp=2), DeviceMesh(tp=4)),
        slow("qwen3", DeviceMesh(), DeviceMesh(tp=2, pp=2)),
        ("qwen3_tied", DeviceMesh(tp=2), DeviceMesh(pp=2)),
        ("qwen3_moe", DeviceMesh(tp=2, ep=2), DeviceMesh(dp=4, ep=4)),
        slow("qwen3_moe", DeviceMesh(), DeviceMesh(dp=2, tp=2, ep=2, etp=2)),
        slow("deepseek_v3", DeviceMesh(tp=2, etp=2), DeviceMesh(pp=2, dp=2, ep=2)),
        ("gpt_oss", DeviceMesh(tp=2), DeviceMesh(dp=2, ep=2)),
    ],
)
def test_megatron_loads_what_was_converted_on_another_layout(
    family, saved, loaded, ranks, checkpoints, tmp_path
):
    folder = checkpoints(family)
    ranks.run(tasks.import_checkpoint, None, folder, tmp_path / "out", saved)
    for differing in ranks.run(tasks.megatron_loads, loaded, folder, tmp_path / "out"):
        assert differing == []


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        slow("qwen3", DeviceMesh(tp=2, pp=2)),
        ("qwen3_moe", DeviceMesh(dp=2, tp=2, ep=2)),
        slow("deepseek_v3", DeviceMesh(tp=2, pp=2, ep=2)),
        ("gpt_oss", DeviceMesh(tp=2, ep=2)),
    ],
)
def test_what_megatron_saved_is_exported_byte_for_byte(family, mesh, ranks, checkpoints, tmp_path):
    folder, saved, config = checkpoints(family), tmp_path / "saved", tmp_path / "config"
    ranks.run(tasks.megatron_saves, mesh, folder, saved)
    config.mkdir()
    (config / "config.json").write_text((folder / "config.json").read_text())
    ranks.run(tasks.export_checkpoint, None, saved, tmp_path / "out", config)
    assert tasks.different(folder, tmp_path / "out") == []


def test_a_vocabulary_that_is_padded_comes_back_without_padding(ranks, checkpoints, tmp_path):
    folder = checkpoints("qwen3", vocab_size=513)
    assert ranks.run(tasks.round_trip, None, folder, tmp_path, [DeviceMesh(tp=4)]) == [[]]
