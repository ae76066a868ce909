"""What a conversion holds at a time, of a checkpoint that is larger: as its report tells."""

import json

import pytest
import torch
import transformers

from megatrain.checkpoint.safetensors_file import TensorSpec, write_tensors
from megatrain.checkpoint.safetensors_folder import INDEX, SafetensorsFolder
from megatrain.export.conversion.expected import expected_originals
from tests.multiprocess import convert_tasks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

SHARD_BYTES = 50_000_000
GATE_AND_UP = 2 * 4096 * 1024 * 2


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A random checkpoint of half a gigabyte in bfloat16, in many shards."""
    folder = tmp_path_factory.mktemp("large")
    transformers.Qwen3Config(
        vocab_size=64_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    shapes = {name: each.spec.shape for name, each in expected_originals(folder).items()}
    specs = {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}
    shards, size = [[]], 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part = {name: specs[name] for name in names}
        write_tensors(folder / file, part, lambda name: torch.randn(shapes[name]).bfloat16())
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_it_holds_no_more_than_one_and_a_half_shards_or_fused_parameters(large, ranks, tmp_path):
    source = SafetensorsFolder(large)
    files = [path.stat().st_size for path in large.glob("*.safetensors")]
    bound = 1.5 * max(*files, GATE_AND_UP)
    assert sum(files) > 2 * bound, "the bound would say nothing"
    reports = [tmp_path / "import.json", tmp_path / "export.json"]
    commands = [
        ["import", large, tmp_path / "middle", "--tp", 2, "--report", reports[0]],
        ["export", tmp_path / "middle", tmp_path / "back", "--report", reports[1]],
    ]
    for command, report in zip(commands, reports, strict=True):
        given = ["convert", *(str(each) for each in command)]
        assert ranks.run(convert_tasks.command, None, *given, timeout_s=250.0)[0][0] == 0
        found = json.loads(report.read_text())
        assert found["plan"]["read_bytes"] > 2 * bound
        assert found["peak_memory_growth"] <= bound
    back = SafetensorsFolder(tmp_path / "back")
    assert back.shapes() == source.shapes()
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(back[name], source[name])
