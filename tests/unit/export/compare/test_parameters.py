"""Numbers of parameters: as Transformers counts them; of quantised files, what they stand for."""

from pathlib import Path

import pytest
import torch
import transformers

from megatrain.export.compare.headers import BITS, StoredTensor, read_folder
from megatrain.export.compare.parameters import count, quantisation
from megatrain.export.compare.place import read_json
from megatrain.testing.tiny import FAMILIES


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_parameters_are_those_of_transformers(checkpoints, family):
    folder = checkpoints(family)
    config = read_json(folder / "config.json")
    found = count(read_folder(folder).values(), config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    buffers = sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))
    assert found.total == sum(p.numel() for p in model.parameters()) + buffers
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert bool(routed) == ("moe" in family or family in ("deepseek_v3", "gpt_oss"))
    assert FAMILIES[family][1].get("num_experts_per_tok", 2) == 2
    assert found.active == found.total - routed // 2  # two of four experts see a token


def stored(name: str, dtype: str, *shape: int) -> StoredTensor:
    num_bytes = torch.Size(shape).numel() * BITS[dtype] // 8
    return StoredTensor(name, Path("x"), dtype, shape, 0, num_bytes)


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        (
            {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
            [stored("a.weight", "F8_E4M3", 256, 128), stored("a.weight_scale_inv", "F32", 2, 1)],
            "fp8 (fmt e4m3, blocks of 128 x 128)",
        ),
        (
            {"quant_method": "mxfp4"},
            [
                stored("experts.gate_up_proj_blocks", "U8", 2, 64, 16, 16),
                stored("experts.gate_up_proj_scales", "U8", 2, 64, 16),
            ],
            "mxfp4",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            [
                stored("a.weight_packed", "I32", 256, 16),
                stored("a.weight_scale", "BF16", 256, 1),
                stored("a.weight_shape", "I64", 2),
            ],
            "compressed-tensors (format pack-quantized, int4 weights)",
        ),
    ],
)
def test_a_quantised_tensor_counts_as_what_it_stands_for(config, tensors, said):
    whole = {"quantization_config": config}
    expected = {"fp8": 256 * 128, "mxfp4": 2 * 64 * 512, "compressed-tensors": 256 * 128}
    assert count(tensors, whole).total == expected[config["quant_method"]]
    assert quantisation(whole) == said


def test_experts_without_a_number_leave_the_active_parameters_open():
    tensors = [stored("layers.0.experts.0.up.weight", "BF16", 4, 4), stored("b", "BF16", 4)]
    assert count(tensors, {}).active is None
    assert count(tensors, {"num_experts": 2, "num_experts_per_tok": 1}).active == 12
