"""Bodies of the OpenAI-compatible endpoints.  What is not here is refused by its name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0)]
Prompt = str | Annotated[list[Token], Field(min_length=1)]


class StreamOptions(BaseModel):
    """How a stream is told."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Common(BaseModel):
    """Options of both endpoints."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=1000)
    n: int = Field(default=1, ge=1, le=128)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=1000)
    """A caller's own mark, which changes nothing here nor at OpenAI."""
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    """Clients send the default, 0; others are refused."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer and are not part of it."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(Common):
    """POST completions."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=128)]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = False
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts, each a text or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class ChatBody(Common):
    """POST chat/completions.  Messages go to the model's template as they are."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=1000)
    tool_choice: Literal["auto", "none"] | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further variables of the template, such as enable_thinking."""
