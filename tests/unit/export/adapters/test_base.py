"""A base checkpoint's tensors: in which files they are."""

import json

import torch
from safetensors.torch import save_file

from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.export.adapters.base import open_base

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}


def test_the_files_of_packed_tensors_are_found_in_one_pass(tmp_path, monkeypatch):
    """A tensor is in the first file that has a part of it; names that begin alike are none."""
    words, scales = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    names = [f"layers.{layer}.weight" for layer in range(20)]
    first = {f"{name}_extra": scales for name in names[10:]} | {"norm": scales}
    first |= {f"{name}_scale": scales for name in names[:10]}
    second = {f"{name}_packed": words for name in names}
    second |= {f"{name}_scale": scales for name in names[10:]}
    for number, tensors in enumerate((first, second)):
        tensors = {name: value.clone() for name, value in tensors.items()}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config = {"quantization_config": settings | {"config_groups": groups}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base, passes, names_of = open_base(tmp_path), [], SafetensorsFolder.__iter__

    def counted(folder):
        passes.append(folder)
        return names_of(folder)

    monkeypatch.setattr(SafetensorsFolder, "__iter__", counted)
    files = {name: base.file_of(name) for name in base.plain}
    assert {name for name, file in files.items() if file == "1.safetensors"} == {*names[10:]}
    assert len(passes) <= 1
