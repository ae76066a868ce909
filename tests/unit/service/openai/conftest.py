"""A base's folder with a small tokenizer, and a port that answers what it is told to."""

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from openai import AsyncOpenAI
from starlette.requests import Request
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatrain.errors import DeniedError, NotFoundError
from megatrain.sampler.types import Piece, SampledSequence, SampleRequest, SampleResult, TopK
from megatrain.service.auth.principal import Principal
from megatrain.service.headers import SecurityHeaders
from megatrain.service.openai.ports import Model, Target
from megatrain.service.openai.router import make_router

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}\n{% endgeneration %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
END = 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: at for at, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE})
    )
    return tmp_path


class Speaker:
    """Says `text`, a byte a token, as far as the request lets it: the port, in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.text = folder, "hello"
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.asked: list[SampleRequest] = []

    async def models(self, who: Principal) -> Sequence[Model]:
        return [Model("base", 5), Model("tinker://a:train:0/sampler_weights/x", 6)]

    async def resolve(self, who: Principal, model: str) -> Target:
        if model not in [each.id for each in await self.models(who)]:
            raise NotFoundError(f"there is no model {model!r}")
        return Target(model, self.folder, 2000, 1990)

    def _drawn(self, request: SampleRequest) -> SampledSequence:
        self.asked.append(request)
        tokens = [*self.tokenizer.encode(self.text).ids, END]
        for size in range(1, len(tokens) + 1):
            said = self.tokenizer.decode(tokens[:size], skip_special_tokens=False)
            if any(str(stop) in said for stop in request.stop or ()):
                tokens = tokens[:size]
                break
        ended = len(tokens) <= request.max_tokens
        tokens = tokens[: request.max_tokens]
        logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        k = request.topk_sample_logprobs
        table = TopK(
            np.tile(np.array(tokens, np.int32)[:, None], (1, k)),
            np.tile(logprobs[:, None], (1, k)),
        )
        return SampledSequence(tokens, logprobs, "stop" if ended else "length", table)

    async def sample(self, who: Principal, target: Target, request: SampleRequest) -> SampleResult:
        return SampleResult([self._drawn(request) for _ in range(request.num_samples)])

    async def stream(
        self, who: Principal, target: Target, request: SampleRequest
    ) -> AsyncIterator[Piece]:
        drawn = self._drawn(request)
        last = len(drawn.tokens) - 1
        for at, token in enumerate(drawn.tokens):
            for index in range(request.num_samples):
                reason = drawn.stop_reason if at == last else None
                assert drawn.topk is not None
                cut = slice(at, at + 1)
                table = TopK(drawn.topk.tokens[cut], drawn.topk.logprobs[cut])
                yield Piece(index, [token], drawn.logprobs[cut], reason, table)


@pytest.fixture
def speaker(folder: Path) -> Speaker:
    return Speaker(folder)


async def authenticate(request: Request, scope: str) -> Principal:
    if request.headers.get("authorization") != "Bearer tml-right":
        raise DeniedError("this key is unknown")
    return Principal("project", 1, frozenset({scope}))


@pytest.fixture
def http(speaker: Speaker) -> AsyncClient:
    app = FastAPI()
    app.include_router(make_router(speaker, authenticate))
    app.add_middleware(SecurityHeaders)
    return AsyncClient(transport=ASGITransport(app), base_url="http://test")


@pytest.fixture
def client(http: AsyncClient) -> AsyncOpenAI:
    made: Any = http  # the client names the type of a copy of httpx
    return AsyncOpenAI(
        base_url="http://test/v1", api_key="tml-right", http_client=made, max_retries=0
    )
