"""compressed-tensors' formats: every entry as its own library dequantises it."""

from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.base import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from megatrain.checkpoint.quantized import plain_tensors
from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.errors import CheckpointError

ROWS, COLUMNS = 6, 48
GRIDS = {"tensor": (1,), "channel": (ROWS, 1), "group": (ROWS, 3)}
"""Shape of scales and zero points, by strategy; 16 columns have one in "group"."""


def opened(folder, stored, *, kind, **weights):
    """Return the view of a checkpoint of one linear, quantised as these settings say."""
    save_file({f"layer.{name}": value for name, value in stored.items()}, folder / "x.safetensors")
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}
    return plain_tensors(SimpleNamespace(quantization_config=settings), SafetensorsFolder(folder))


def theirs(stored, *, kind, **weights):
    """Return the weight that compressed-tensors makes of what is stored."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    return BaseCompressor.get_value_from_registry(kind).decompress(dict(stored), scheme)["weight"]


def check(view, expected):
    """Compare the whole, and a part that begins and ends inside of groups."""
    name = "layer.weight"
    assert view.shape(name) == tuple(expected.shape)
    torch.testing.assert_close(view[name], expected, rtol=1e-6, atol=0)
    part = slice(2, 5), slice(5, 35)
    torch.testing.assert_close(view.slice(name)[part], expected[part], rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("strategy", GRIDS)
def test_bytes_are_what_compressed_tensors_makes_of_them(strategy, symmetric, tmp_path):
    make = torch.Generator().manual_seed(0)
    stored = {
        "weight": torch.randint(-128, 128, (ROWS, COLUMNS), generator=make, dtype=torch.int8),
        "weight_scale": torch.rand(GRIDS[strategy], generator=make) + 0.5,
    }
    if not symmetric:
        zeros = torch.randint(-99, 99, GRIDS[strategy], generator=make, dtype=torch.int8)
        stored["weight_zero_point"] = zeros
    size = 16 if strategy == "group" else None
    options = {"num_bits": 8, "type": "int", "strategy": strategy, "group_size": size}
    options |= {"symmetric": symmetric, "kind": "int-quantized"}
    check(opened(tmp_path, stored, **options), theirs(stored, **options))


@pytest.mark.parametrize("rows", [ROWS, 8])
def test_blocks_are_what_compressed_tensors_makes_of_them(rows, tmp_path):
    make = torch.Generator().manual_seed(0)
    weight = torch.randn((rows, COLUMNS), generator=make).to(torch.float8_e4m3fn)
    stored = {"weight": weight, "weight_scale": torch.rand((2, 3), generator=make) + 0.5}
    options = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 16]}
    options["kind"] = "float-quantized"
    check(opened(tmp_path, stored, **options), theirs(stored, **options))


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("float-quantized", {"strategy": "tensor_group"}, "8. bits and strategy tensor_group"),
        ("float-quantized", {"strategy": "block", "symmetric": False}, "strategy block is not"),
        ("pack-quantized", {"group_size": None}, "strategy tensor is not known"),
    ],
)
def test_another_strategy_is_refused_by_name(kind, change, text, tmp_path):
    options = {"num_bits": 8, "group_size": 16, "block_structure": [4, 16]} | change
    with pytest.raises(CheckpointError, match=text):
        opened(tmp_path, {"weight": torch.zeros(4, 16)}, kind=kind, **options)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [12, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_rows_that_do_not_fill_their_last_word_are_not_longer(
    bits, group, symmetric, tmp_path
):
    make, rows, top = torch.Generator().manual_seed(0), 12, 1 << (bits - 1)
    columns = 36 if group else 35
    grid = (rows, columns // (group or columns))
    values = torch.randint(-top, top, (rows, columns), generator=make, dtype=torch.int8)
    stored = {
        "weight_packed": pack_to_int32(values, bits),
        "weight_scale": torch.rand(grid, generator=make) + 0.5,
        "weight_shape": torch.tensor(values.shape),
    }
    if not symmetric:
        zeros = torch.randint(-top, top, grid, generator=make, dtype=torch.int8)
        stored["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
    strategy = "group" if group else "channel"
    options = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group}
    options |= {"symmetric": symmetric, "kind": "pack-quantized"}
    check(opened(tmp_path, stored, **options), theirs(stored, **options))


def test_a_group_size_that_does_not_fit_the_file_is_refused(tmp_path):
    stored = {
        "weight_packed": torch.zeros(4, 6, dtype=torch.int32),
        "weight_scale": torch.ones(4, 3),
    }
    options = {"num_bits": 4, "strategy": "group", "group_size": 32, "kind": "pack-quantized"}
    with pytest.raises(CheckpointError, match="of 96 columns at 4 bits has 12 words a row, not 6"):
        opened(tmp_path, stored, **options)
