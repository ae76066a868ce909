"""The official client against the routes."""

import asyncio
import json
from typing import Any

import pytest
from httpx import AsyncClient
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError

USER: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_models_are_listed_and_found_by_names_with_slashes(client: AsyncOpenAI) -> None:
    async def run() -> None:
        ids = [each.id async for each in client.models.list()]
        assert ids == ["base", "tinker://a:train:0/sampler_weights/x"]
        with pytest.raises(NotFoundError, match="there is no model 'other'"):
            await client.models.retrieve("other")

    asyncio.run(run())


def test_a_path_is_a_model_under_both_prefixes(http: AsyncClient) -> None:
    async def run() -> None:
        for prefix in ("/v1", "/oai/api/v1"):
            answer = await http.get(
                f"{prefix}/models/tinker://a:train:0/sampler_weights/x",
                headers={"authorization": "Bearer tml-right"},
            )
            assert answer.json()["created"] == 6

    asyncio.run(run())


def test_a_completion_ends_before_its_stop_string(client: AsyncOpenAI, speaker: Any) -> None:
    speaker.text = "one two three"
    said = asyncio.run(
        client.completions.create(model="base", prompt="ab", stop=[" th"], max_tokens=50, n=2)
    )
    assert [each.text for each in said.choices] == ["one two"] * 2
    assert said.choices[0].finish_reason == "stop"
    assert said.usage is not None
    assert said.usage.prompt_tokens == 2
    assert said.usage.completion_tokens == 2 * len("one two th")
    assert speaker.asked[0].stop == (" th", "<end>")


def test_a_completion_that_is_cut_says_length_and_takes_tokens(
    client: AsyncOpenAI, speaker: Any
) -> None:
    said = asyncio.run(
        client.completions.create(
            model="base", prompt=[[1, 2, 3], [4]], max_tokens=3, seed=4, temperature=0, top_p=0.5
        )
    )
    assert [each.text for each in said.choices] == ["hel", "hel"]
    assert [each.index for each in said.choices] == [0, 1]
    assert said.choices[0].finish_reason == "length"
    first = speaker.asked[0]
    assert first.prompt == (1, 2, 3)
    assert (first.seed, first.temperature, first.top_p) == (4, 0, 0.5)


def test_log_probabilities_come_in_both_formats(client: AsyncOpenAI) -> None:
    async def run() -> None:
        text = await client.completions.create(model="base", prompt="a", max_tokens=2, logprobs=1)
        told = text.choices[0].logprobs
        assert told is not None
        assert (told.tokens, told.token_logprobs) == (["h", "e"], [-1, -2])
        assert told.text_offset == [0, 1]
        assert told.top_logprobs == [{"h": -1}, {"e": -2}]
        chat = await client.chat.completions.create(
            model="base", messages=USER, max_tokens=2, logprobs=True, top_logprobs=1
        )
        content = chat.choices[0].logprobs
        assert content is not None
        assert content.content is not None
        assert [(each.token, each.logprob, each.bytes) for each in content.content] == [
            ("h", -1, [104]),
            ("e", -2, [101]),
        ]
        assert content.content[1].top_logprobs[0].token == "e"

    asyncio.run(run())


def test_a_chat_goes_through_the_template(client: AsyncOpenAI, speaker: Any) -> None:
    said = asyncio.run(client.chat.completions.create(model="base", messages=USER))
    assert said.choices[0].message.content == "hello"
    assert said.choices[0].finish_reason == "stop"
    prompt = speaker.tokenizer.decode(list(speaker.asked[0].prompt))
    assert prompt == "user:hi\nassistant:"
    assert speaker.asked[0].max_tokens == 2000 - len(prompt) < 1990


def test_a_streamed_chat_says_what_a_whole_one_says(client: AsyncOpenAI, speaker: Any) -> None:
    speaker.text = "größer 😀 than STOP this"

    async def run() -> None:
        stream = await client.chat.completions.create(
            model="base",
            messages=USER,
            n=2,
            stop="STOP",
            stream=True,
            stream_options={"include_usage": True},
        )
        texts, reasons, usage = ["", ""], [], None
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons.extend([choice.finish_reason] if choice.finish_reason else [])
            usage = chunk.usage or usage
        assert texts == ["größer 😀 than "] * 2
        assert reasons == ["stop", "stop"]
        assert usage is not None
        assert usage.completion_tokens == 2 * len("größer 😀 than STOP".encode())

    asyncio.run(run())


def test_a_streamed_completion_ends_with_done(http: AsyncClient) -> None:
    body = {"model": "base", "prompt": "ab", "stream": True, "echo": True}
    answer = asyncio.run(
        http.post("/v1/completions", json=body, headers={"authorization": "Bearer tml-right"})
    )
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(each)["choices"][0]["text"] for each in lines[:-1]) == "abhello"
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_tool_calls_are_parsed_whole_and_streamed(client: AsyncOpenAI, speaker: Any) -> None:
    speaker.text = "Let me see. " + CALL

    async def run() -> None:
        said = await client.chat.completions.create(model="base", messages=USER, tools=[TOOL])
        message = said.choices[0].message
        assert message.content == "Let me see."
        assert message.tool_calls is not None
        call: Any = message.tool_calls[0]
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
        assert said.choices[0].finish_reason == "tool_calls"
        prompt = speaker.tokenizer.decode(list(speaker.asked[0].prompt))
        assert json.loads(prompt[: prompt.index("user:")]) == [TOOL]
        stream = await client.chat.completions.create(
            model="base", messages=USER, tools=[TOOL], stream=True
        )
        text, names, last = "", [], None
        async for chunk in stream:
            delta = chunk.choices[0].delta
            text += delta.content or ""
            names += [each.function and each.function.name for each in delta.tool_calls or []]
            last = chunk.choices[0].finish_reason
        assert (text, names, last) == ("Let me see. ", ["add"], "tool_calls")

    asyncio.run(run())


def test_a_call_that_is_no_json_stays_text(client: AsyncOpenAI, speaker: Any) -> None:
    speaker.text = "<tool_call>nothing</tool_call>"
    said = asyncio.run(client.chat.completions.create(model="base", messages=USER, tools=[TOOL]))
    assert said.choices[0].message.content == speaker.text
    assert said.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("option", "value"),
    [("logit_bias", {"1": 5}), ("modalities", ["audio"]), ("frequency_penalty", 0.5)],
)
def test_what_is_not_supported_is_refused_by_name(
    client: AsyncOpenAI, option: str, value: object
) -> None:
    with pytest.raises(BadRequestError, match=option) as caught:
        asyncio.run(
            client.chat.completions.create(model="base", messages=USER, extra_body={option: value})
        )
    assert caught.value.param == option


def test_a_prompt_over_the_context_is_refused(client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError, match="context is 2000"):
        asyncio.run(client.completions.create(model="base", prompt="a" * 1999, max_tokens=2))


@pytest.mark.parametrize(
    ("text", "rule"),
    [(r"\ud800", "no text in Unicode"), ("a" * 200_000, "longer than the context")],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_text_that_cannot_be_tokenized_is_refused(
    http: AsyncClient, text: str, rule: str, path: str
) -> None:
    asked = f'"prompt": "{text}"'
    if path.startswith("chat"):
        asked = f'"messages": [{{"role": "user", "content": "{text}"}}]'
    answer = asyncio.run(
        http.post(
            f"/v1/{path}",
            content=f'{{"model": "base", {asked}}}',
            headers={"authorization": "Bearer tml-right", "content-type": "application/json"},
        )
    )
    assert answer.status_code == 400
    assert rule in answer.json()["error"]["message"]


def test_a_client_that_has_hung_up_is_not_drawn_for(speaker: Any, http: AsyncClient) -> None:
    """As a server tells it: the body, then a disconnect while the sampler draws."""
    ended: list[str] = []

    async def sample(*asked: Any) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    speaker.sample = sample
    body = json.dumps({"model": "base", "prompt": "hi"}).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(0.01)
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", b"Bearer tml-right"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": headers,
    }
    transport: Any = http._transport
    asyncio.run(asyncio.wait_for(transport.app(scope, receive, send), 10.0))
    assert sent[0]["status"] == 499
    assert ended == ["cancelled"]


def test_a_wrong_key_is_refused_with_security_headers(
    client: AsyncOpenAI, http: AsyncClient
) -> None:
    async def run() -> None:
        with pytest.raises(AuthenticationError) as caught:
            await client.with_options(api_key="tml-wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        headers = caught.value.response.headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers

    asyncio.run(run())
