"""A base with adapters in vLLM, and what Transformers and PEFT say of them."""

import asyncio
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from megatrain.cli.quickstart.base_model import build_model
from megatrain.cli.quickstart.tokenizer import build_tokenizer
from megatrain.config.service import SamplerConfig
from megatrain.sampler.types import SampleRequest, SampleResult
from megatrain.sampler.vllm.environment import find
from megatrain.sampler.vllm.sampler import VllmSampler
from tests.fixtures.small_model import SHAPE, TEXT

ENVIRONMENT = find()
TOLERANCE = 1e-4
"""Of log-probabilities in float32, by two programs; 1e-5 is usual."""
PROMPT = tuple(range(20, 29))
LINEARS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
TARGETS = {"a": LINEARS, "b": [*LINEARS, "lm_head"]}
NAMES = (None, "a", "b")
OPTIONS: dict[str, Any] = {"max_batch": 32, "max_lora_rank": 8, "kv_cache_bytes": 64 << 20}


def make_base(folder: Path) -> Path:
    """Write a model whose heads are wide enough for vLLM."""
    tokenizer = build_tokenizer(TEXT, vocab_size=SHAPE.vocab_size)
    build_model(replace(SHAPE, head_dim=32), tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Setting:
    """A base, two adapters, and an engine that has them."""

    def __init__(self, folder: Path, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.base = make_base(folder / "base")
        self.folders = {
            name: self.adapter(folder / name, seed, targets)
            for seed, (name, targets) in enumerate(TARGETS.items())
        }
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.base)
        config = SamplerConfig(engine="vllm", max_adapters=3, max_loras=2, **OPTIONS)
        self.sampler = VllmSampler(config, self.base, is_float32=True, environment=ENVIRONMENT)

    def plain(self) -> Any:
        """Return the base alone."""
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()

    def adapter(self, folder: Path, seed: int, targets: list[str]) -> Path:
        """Write an adapter that matters."""
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(self.plain(), config).save_pretrained(folder)
        return folder

    def truth(self, name: str | None, folder: Path | None = None) -> Any:
        """Return Transformers' model with an adapter of PEFT."""
        if name is None:
            return self.plain()
        return PeftModel.from_pretrained(self.plain(), str(folder or self.folders[name])).eval()

    def sample(self, *requests: SampleRequest) -> list[SampleResult]:
        """Draw several requests at once."""

        async def draw() -> list[SampleResult]:
            return list(await asyncio.gather(*map(self.sampler.sample, requests)))

        return self.runner.run(draw())


def request(**values: Any) -> SampleRequest:
    return SampleRequest(**{"prompt": PROMPT, "max_tokens": 12, "stop": (), **values})


def logits_of(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def shaped(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Return log-probabilities as Transformers' own processors make them."""
    logits = logits / temperature
    nothing: Any = None
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(nothing, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(nothing, logits)
    return logits.log_softmax(-1)


def assert_close(found: npt.NDArray[Any], expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=TOLERANCE)


def assert_agrees(model: Any, result: SampleResult) -> None:
    """Compare a sample's log-probabilities with those of Transformers and PEFT."""
    for sequence in result.sequences:
        logits = logits_of(model, (*PROMPT, *sequence.tokens))[len(PROMPT) - 1 : -1]
        chosen = torch.tensor(sequence.tokens)[:, None]
        assert_close(sequence.logprobs, logits.log_softmax(-1).gather(1, chosen)[:, 0])
