"""A base with adapters in vLLM, and what Transformers and PEFT say of them."""

import asyncio
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from megatrain.cli.quickstart.base_model import build_model
from megatrain.cli.quickstart.tokenizer import build_tokenizer
from megatrain.config.service import SamplerConfig
from megatrain.sampler.vllm.environment import find
from megatrain.sampler.vllm.sampler import VllmSampler
from tests.fixtures.sampling_truth import Engine
from tests.fixtures.small_model import SHAPE, TEXT

ENVIRONMENT = find()
MARKS = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(
        ENVIRONMENT is None, reason="vLLM is not installed: `megatrain sampler install --cpu`"
    ),
]
LINEARS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
TARGETS = {"a": LINEARS, "b": [*LINEARS, "lm_head"]}
OPTIONS: dict[str, Any] = {"max_batch": 32, "max_lora_rank": 8, "kv_cache_bytes": 64 << 20}


def make_base(folder: Path) -> Path:
    """Write a model whose heads are wide enough for vLLM."""
    tokenizer = build_tokenizer(TEXT, vocab_size=SHAPE.vocab_size)
    build_model(replace(SHAPE, head_dim=32), tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Setting(Engine):
    """A base, two adapters, and an engine that has them."""

    def __init__(self, folder: Path, runner: asyncio.Runner) -> None:
        super().__init__(runner)
        self.base = make_base(folder / "base")
        self.folders = {
            name: self.adapter(folder / name, seed, targets)
            for seed, (name, targets) in enumerate(TARGETS.items())
        }
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.base)
        config = SamplerConfig(engine="vllm", max_adapters=3, max_loras=2, **OPTIONS)
        self.sampler = VllmSampler(config, self.base, is_float32=True, environment=ENVIRONMENT)

    def adapter(self, folder: Path, seed: int, targets: list[str]) -> Path:
        """Write an adapter that matters."""
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(self.plain(), config).save_pretrained(folder)
        return folder
