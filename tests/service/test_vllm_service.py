"""vLLM with experts in one tensor, and under the service, with Tinker's client."""

import asyncio
import contextlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from peft import LoraConfig, get_peft_model
from tinker import types
from transformers import AutoModelForCausalLM

from megatrain.config.service import SamplerConfig
from megatrain.errors import DataError
from megatrain.sampler.types import SampleResult
from megatrain.sampler.vllm.sampler import VllmSampler
from megatrain.testing.tiny import make_checkpoint
from tests.fixtures.sampling_truth import (
    PROMPT,
    TOLERANCE,
    assert_agrees,
    assert_close,
    logits_of,
    request,
)
from tests.service.server import NAME, Server
from tests.service.vllm_setting import ENVIRONMENT, MARKS, OPTIONS, make_base

pytestmark = MARKS


def test_experts_are_adapted_in_one_tensor_as_peft_writes_them(tmp_path: Path) -> None:
    """A mixture without a tokenizer, on processors, where vLLM itself has no kernel for it."""
    base = make_checkpoint(tmp_path / "base", "qwen3_moe", head_dim=32, initializer_range=0.05)
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    adapted = get_peft_model(plain, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")

    async def draw() -> list[SampleResult]:
        options = SamplerConfig(engine="vllm", max_adapters=2, **OPTIONS)
        sampler = VllmSampler(options, base, is_float32=True, environment=ENVIRONMENT)
        await sampler.start()
        try:
            await sampler.load_adapter("e", tmp_path / "adapter")
            asked = [request(adapter=name, prompt_logprobs=True) for name in (None, "e")]
            with pytest.raises(DataError, match="need a tokenizer"):
                await sampler.sample(request(stop=("a",)))
            return list(await asyncio.gather(*map(sampler.sample, asked)))
        finally:
            await sampler.close()

    of_base, of_adapter = asyncio.run(draw())
    for result, model in ((of_adapter, adapted), (of_base, adapted.get_base_model())):
        with adapted.disable_adapter() if result is of_base else contextlib.nullcontext():
            assert_agrees(model, result)
            logprobs = logits_of(model, PROMPT)[:-1].log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
        assert result.prompt_logprobs is not None
        assert_close(result.prompt_logprobs[1:], own)
    assert not np.allclose(of_base.prompt_logprobs[1:], of_adapter.prompt_logprobs[1:], atol=0.1)


def test_the_service_samples_with_vllm_from_what_was_trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The service itself compares trainer and sampler before a version is sampled from."""
    base = make_base(tmp_path_factory.mktemp("base") / "base")
    server = Server(base, tmp_path_factory.mktemp("service"), "--sampler", "vllm")
    server.start()
    try:
        warnings.simplefilter("ignore")
        service = tinker.ServiceClient(base_url=server.url, api_key=server.key)
        training = service.create_lora_training_client(base_model=NAME, rank=4, seed=1).result()
        ids = list(range(5, 26))
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(ids[:-1]),
            loss_fn_inputs={
                "target_tokens": types.TensorData(data=ids[1:], dtype="int64", shape=[20])
            },
        )
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        sampler = training.save_weights_and_get_sampling_client()
        scored = training.forward([datum], "cross_entropy").result()
        trained = list(scored.loss_fn_outputs[0]["logprobs"].data)
        found = sampler.compute_logprobs(types.ModelInput.from_ints(ids)).result()
        np.testing.assert_allclose(found[1:], trained, atol=TOLERANCE)
        params = types.SamplingParams(max_tokens=6, seed=3, temperature=1.0, stop=[])
        drawn = sampler.sample(types.ModelInput.from_ints(ids[:5]), 3, params).result().sequences
        assert len({tuple(each.tokens) for each in drawn}) == 3
        assert "Loaded new LoRA adapter: name" in server.log  # vLLM's own word
    finally:
        assert server.stop() == 0
