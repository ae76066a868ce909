"""The estimate of parameters and memory, beside what ranks hold and what they measure."""

import json

import pytest

from megatrain.config.estimate import Training, estimate
from megatrain.parallel.layout import DeviceMesh
from megatrain.testing.ranks import RankPool
from tests.multiprocess import estimate_tasks

pytestmark = pytest.mark.multiprocess

LORA = {"r": 4, "target_modules": "all-linear"}
TP2, PP2, TP2PP2 = DeviceMesh(tp=2), DeviceMesh(pp=2), DeviceMesh(tp=2, pp=2)
EP2 = DeviceMesh(dp=2, ep=2)


@pytest.mark.parametrize(
    ("family", "meshes"),
    [
        ("llama", [TP2PP2]),
        ("qwen2", [TP2]),
        ("qwen3", [DeviceMesh(), TP2, PP2, DeviceMesh(pp=2, vpp=2), DeviceMesh(tp=4)]),
        ("qwen3_tied", [DeviceMesh(), TP2PP2]),
        ("qwen3_moe", [TP2, EP2, DeviceMesh(tp=2, ep=2), DeviceMesh(tp=2, etp=2), TP2PP2]),
        ("deepseek_v3", [DeviceMesh(), TP2, PP2, EP2]),
        ("gpt_oss", [TP2, EP2]),
    ],
)
@pytest.mark.slow
def test_every_rank_holds_as_many_parameters_as_estimated(family, meshes, ranks, checkpoints):
    folder = checkpoints(family)
    config = json.loads((folder / "config.json").read_text())
    lora = None if family == "gpt_oss" else LORA
    for mesh in meshes:
        expected = estimate(config, mesh, Training(lora=lora)).ranks
        found = ranks.run(estimate_tasks.parameter_counts, mesh, folder, lora)
        each = mesh.world_size // mesh.pp
        for rank, counts in enumerate(found):
            stage = expected[rank // each]
            assert counts["base"] == sum(stage.parameters.values()), (mesh, rank)
            if lora is not None:
                assert counts["factors"] == stage.trained, (mesh, rank)


SMALL = {"hidden_size": 192, "intermediate_size": 448, "vocab_size": 1000}


def batch_of(num_sequences, length, vocab_size):
    """Return sequences of one length with a label everywhere."""
    tokens = [[(7 * i + j) % vocab_size for i in range(length)] for j in range(num_sequences)]
    return [{"input_ids": each, "labels": each} for each in tokens]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [DeviceMesh(), TP2], ids=DeviceMesh.describe)
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", LORA),
        ("qwen3", LORA),
        ("qwen3", None),
        ("qwen3_moe", LORA),
        ("qwen3_moe", None),
        ("deepseek_v3", LORA),
    ],
)
def test_activations_are_what_autograd_keeps(family, lora, mesh, ranks, checkpoints):
    folder = checkpoints(family, **SMALL)
    config = json.loads((folder / "config.json").read_text())
    training = Training(precision="no", lora=lora, sequence_length=320, tokens_per_microbatch=640)
    batch = batch_of(2, 320, 1000)
    expected = estimate(config, mesh, training).ranks[0].activations
    found = ranks.run(estimate_tasks.saved_bytes, mesh, folder, lora, batch)
    # Left out: statistics of norms, indices of the dispatcher, uneven loads of experts.  Counted
    # though not kept: the first layer's input, which needs no gradient, an eighth of its layer.
    assert found == pytest.approx([expected] * len(found), rel=0.08)


SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
"""The benchmark's 100m shape."""


@pytest.fixture
def new_ranks():
    """Ranks that have loaded nothing before, whose allocator holds no pages to use again."""
    pool = RankPool(2)
    yield pool
    pool.close()


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
CASES = {
    "1": ("qwen3", DeviceMesh()),
    "tp2": ("qwen3", TP2),
    "dp2": ("qwen3", DeviceMesh(dp=2)),
    "pp2": ("qwen3", PP2),
    "moe-ep2": ("qwen3_moe", EP2),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lora", [{**LORA, "r": 16}, None], ids=["lora", "full"])
def test_a_ranks_peak_on_cpu_is_within_15_percent(lora, case, new_ranks, checkpoints):
    family, mesh = CASES[case]
    folder = checkpoints(family, **SHAPE, **(EXPERTS if family == "qwen3_moe" else {}))
    config = json.loads((folder / "config.json").read_text())
    training = Training(precision="no", lora=lora, sequence_length=1024, tokens_per_microbatch=2048)
    # A micro-batch for each data parallel rank and stage.  Adam's moments are there from the second
    # forward_backward on.
    batches = [batch_of(2 * mesh.dp * mesh.pp, 1024, 32_000)] * (1 if lora else 2)
    options = {"max_tokens_per_microbatch": 2048}
    stages = estimate(config, mesh, training).ranks
    measured = new_ranks.run(
        estimate_tasks.peak_growth, mesh, folder, lora, batches, options, timeout_s=500.0
    )
    for rank, found in enumerate(measured):
        expected = stages[rank * mesh.pp // mesh.world_size].peak
        print(f"{case}, rank {rank}: estimated {expected / 1e6:.0f} MB, measured {found / 1e6:.0f}")
        assert expected == pytest.approx(found, rel=0.15)
