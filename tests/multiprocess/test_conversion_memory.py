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

DENSE = transformers.Qwen3Config(
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
)
EXPERTS = transformers.Qwen3MoeConfig(
    vocab_size=4_000,
    hidden_size=1024,
    moe_intermediate_size=768,
    num_experts=24,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    decoder_sparse_step=1,
    tie_word_embeddings=False,
    architectures=["Qwen3MoeForCausalLM"],
    dtype="bfloat16",
)
CASES = {"dense": (DENSE, 50_000_000), "experts": (EXPERTS, 10_000_000)}
"""Configuration, and bytes of a shard."""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Make a random checkpoint in bfloat16, in many shards."""
    made = {}

    def make(case):
        if case not in made:
            made[case] = random_checkpoint(tmp_path_factory.mktemp(case), *CASES[case])
        return made[case]

    return make


def random_checkpoint(folder, config, shard_bytes):
    """Write a checkpoint tensor by tensor; return its folder."""
    config.save_pretrained(folder)
    shapes = {name: each.spec.shape for name, each in expected_originals(folder).items()}
    specs = {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}
    shards, size = [[]], 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > shard_bytes:
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


def fused_bytes(config):
    """Return the bytes of gate and up in one."""
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    return 2 * width * config.hidden_size * 2


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_it_holds_no_more_than_one_and_a_half_shards_or_fused_parameters(
    case, workers, large, ranks, tmp_path
):
    folder = large(case)
    source = SafetensorsFolder(folder)
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    bound = 1.5 * max(*files, fused_bytes(CASES[case][0]))
    assert sum(files) > 2 * bound, "the bound would say nothing"
    reports = [tmp_path / "import.json", tmp_path / "export.json"]
    commands = [
        ["import", folder, tmp_path / "middle", "--tp", 2, "--file-size", "100MB"],
        ["export", tmp_path / "middle", tmp_path / "back"],
    ]
    for command, report in zip(commands, reports, strict=True):
        more = ["--report", report, "--workers", workers]
        given = ["convert", *(str(each) for each in [*command, *more])]
        assert ranks.run(convert_tasks.command, None, *given, timeout_s=250.0)[0][0] == 0
        found = json.loads(report.read_text())
        assert found["plan"]["read_bytes"] > 2 * bound
        assert found["peak_memory_growth"] <= bound
        assert found["peak_memory_growth"] <= found["plan"]["memory_bytes"]
    back = SafetensorsFolder(tmp_path / "back")
    assert back.shapes() == source.shapes()
    name = next(name for name in source if "layers.1" in name and "up_proj" in name)
    assert torch.equal(back[name], source[name])
