"""Checkpoints quantised as published, dequantised while loading, against Transformers' own."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.utils.quantization_config import CompressedTensorsConfig

from megatrain.checkpoint.quantized import plain_tensors
from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.parallel.layout import DeviceMesh
from tests.fixtures import quantized_files
from tests.multiprocess import family_tasks, tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.truth import all_logps, largest_difference

pytestmark = [
    pytest.mark.multiprocess,
    # Said when from_pretrained is told to dequantise.
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]

TOLERANCE = 1e-5
PACKED_4 = functools.partial(quantized_files.compressed, kind="pack-quantized", bits=4, group=16)
PACKED_8 = functools.partial(quantized_files.compressed, kind="pack-quantized", bits=8, group=None)
BYTES = functools.partial(quantized_files.compressed, kind="int-quantized", bits=8, group=None)
UNPACK = functools.partial(CompressedTensorsConfig, run_compressed=False)
CASES = {
    "fp8-deepseek": (
        "deepseek_v3",
        functools.partial(quantized_files.fp8_blocks, block=(8, 16)),
        functools.partial(FineGrainedFP8Config, dequantize=True),
    ),
    "mxfp4-gpt-oss": (
        "gpt_oss",
        quantized_files.mxfp4,
        functools.partial(Mxfp4Config, dequantize=True),
    ),
    "int4-groups": ("llama", PACKED_4, UNPACK),
    "int4-groups-of-experts": ("deepseek_v3", PACKED_4, None),
    "int8-rows": ("llama", PACKED_8, UNPACK),
    "int8-bytes": ("qwen3", BYTES, UNPACK),
}


def dequantized(folder: Path, out: Path, plain: Path) -> Path:
    """Write the plain twin of a checkpoint that compressed-tensors has packed."""
    from compressed_tensors.compressors.pack_quantized.base import unpack_from_int32
    from safetensors.torch import save_file

    stored, tensors = load_file(folder / "model.safetensors"), {}
    for name, value in load_file(plain / "model.safetensors").items():
        if f"{name}_packed" not in stored:
            tensors[name] = value
            continue
        integers = unpack_from_int32(stored[f"{name}_packed"], 4, value.shape)
        scale = stored[f"{name}_scale"].repeat_interleave(16, 1)
        tensors[name] = integers.float() * scale
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((plain / "config.json").read_text())
    return out


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_are_those_of_the_tensors_that_transformers_dequantises(
    name, ranks, checkpoints, tmp_path
):
    family, quantize, settings = CASES[name]
    plain, batch = checkpoints(family), random_batch(4)
    folder = quantize(plain, tmp_path / "quantized")
    if settings is None:
        # Transformers fuses experts before compressed-tensors sees them: a twin of plain tensors.
        twin = dequantized(folder, tmp_path / "twin", plain)
        model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=settings()
        )
    # Transformers leaves MXFP4 experts in bfloat16, which holds them exactly, and computes in it.
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    expected = all_logps(model.eval(), batch)
    for mesh in (DeviceMesh(), DeviceMesh(tp=2)):
        for actual in ranks.run(tasks.base_logps, mesh, folder, batch):
            assert largest_difference(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("block", [(128, 128), (24, 48), (16, 16)], ids=str)
def test_blocks_that_do_not_divide_a_matrix_are_cut_at_its_end(block, checkpoints, tmp_path):
    plain = checkpoints("qwen3")
    folder = quantized_files.fp8_blocks(plain, tmp_path / "fp8", block)
    view = plain_tensors(AutoConfig.from_pretrained(folder), SafetensorsFolder(folder))
    stored = load_file(folder / "model.safetensors")
    assert set(view) == set(load_file(plain / "model.safetensors"))
    name = "model.layers.1.mlp.gate_proj.weight"
    expected = stored[name].float()
    rows, columns = expected.shape
    for i in range(math.ceil(rows / block[0])):
        for j in range(math.ceil(columns / block[1])):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            expected[part] *= stored[f"{name}_scale_inv"][i, j]
    assert torch.equal(view[name], expected)
    assert torch.equal(view.slice(name)[30:61], expected[30:61])
    assert torch.equal(view.slice(name)[:, 7:50], expected[:, 7:50])
    assert view.shape(name) == (rows, columns)


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_a_part_is_the_part_of_the_whole(kind, checkpoints, tmp_path):
    if kind == "int4":
        folder = PACKED_4(checkpoints("llama"), tmp_path / "q")
        name, part = "model.layers.0.mlp.down_proj.weight", (slice(3, 40), slice(5, 77))
    else:
        folder = quantized_files.mxfp4(checkpoints("gpt_oss"), tmp_path / "q")
        name = "model.layers.0.mlp.experts.down_proj"
        part = (slice(1, 3), slice(37, 101), slice(2, 9))
    view = plain_tensors(AutoConfig.from_pretrained(folder), SafetensorsFolder(folder))
    whole = view.slice(name)[...]
    assert tuple(whole.shape) == view.shape(name)
    assert torch.equal(view.slice(name)[part], whole[part])
    assert torch.equal(view[name], whole)


def test_an_unknown_method_is_refused_by_name(ranks, checkpoints, tmp_path):
    folder = quantized_files.rewrite(
        checkpoints("qwen3"), tmp_path / "q", {"quant_method": "aqlm"}, lambda n, v: {n: v}
    )
    error = ranks.run(family_tasks.loading_error, DeviceMesh(), folder)[0]
    assert error is not None
    assert "CheckpointError" in error[0]
    assert "unknown quant_method 'aqlm' in config.json; known: fp8, mxfp4" in error[1]


def test_an_unknown_packing_is_refused_by_name(checkpoints, tmp_path):
    folder = PACKED_4(checkpoints("llama"), tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = "marlin-24"
    (folder / "config.json").write_text(json.dumps(config))
    source = SafetensorsFolder(folder)
    with pytest.raises(Exception, match="compressed-tensors of format 'marlin-24'"):
        plain_tensors(AutoConfig.from_pretrained(folder), source)
