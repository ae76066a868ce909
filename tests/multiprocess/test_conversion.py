"""Hugging Face to Megatron's distributed checkpoints and back, against Megatron's own code."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.parallel.layout import DeviceMesh
from tests.fixtures.support_record import PLAN
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
@pytest.mark.slow
def test_megatron_loads_what_was_converted_on_another_layout(
    family, saved, loaded, ranks, checkpoints, tmp_path
):
    folder = checkpoints(family)
    ranks.run(tasks.import_checkpoint, None, folder, tmp_path / "out", saved)
    for differing in ranks.run(tasks.megatron_loads, loaded, folder, tmp_path / "out"):
        assert differing == []


OTHERS = [
    (family, loaded)
    for family, plan in PLAN.items()
    if plan.refused is None and family not in LAYOUTS
    for name, loaded in (("pp", DeviceMesh(pp=2)), ("ep", DeviceMesh(dp=2, ep=2)))
    if name not in plan.refused_layouts and (name == "pp" or plan.has_experts)
]
"""Families that the tests above do not load, and a layout that TP2 becomes."""


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize(
    ("family", "loaded"), OTHERS, ids=[f"{f} on {m.describe()}" for f, m in OTHERS]
)
def test_every_family_goes_from_tp_to_another_layout(family, loaded, ranks, checkpoints, tmp_path):
    folder = checkpoints(family)
    ranks.run(tasks.import_checkpoint, None, folder, tmp_path / "out", DeviceMesh(tp=2))
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
@pytest.mark.slow
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


@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(tp=2)], ids=DeviceMesh.describe)
def test_each_tensor_keeps_its_own_dtype(mesh, ranks, checkpoints, tmp_path):
    """Parts of one fused parameter, too: it is held in the dtype that holds them all."""
    folder = tmp_path / "mixed"
    shutil.copytree(checkpoints("qwen3"), folder)
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        wide = "norm" in name or name.endswith(
            ("0.self_attn.k_proj.weight", "1.mlp.up_proj.weight")
        )
        half = torch.float16 if "embed" in name else torch.bfloat16
        tensors[name] = value if wide else value.to(half)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert ranks.run(tasks.round_trip, None, folder, tmp_path, [mesh]) == [[]]
