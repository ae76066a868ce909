"""Which characters of a rendered conversation the assistant says, turn by turn.

A turn begins where the generation prompt ends, so that it is what a model has to write after the
prompt: thinking and tool calls included, and a thinking block that the prompt opens left out.  It
ends with the token that ends the turn, so that the model learns to stop; white space behind that
token is the template's and does not count.
Where the template has `{% generation %}` blocks, they are taken as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError

from megatrain.data.template.marking import Marked
from megatrain.data.template.messages import Message
from megatrain.data.template.tokens import Span
from megatrain.errors import ConfigError

PROBE = "\u2e3b\u29d7\u2e3b"
"""A text that no template and no conversation begins with."""

WAY_OUT = (
    "put {% generation %} ... {% endgeneration %} around the assistant's words in a copy of the "
    'template (chat_template="my.jinja"), or override Template.message_spans'
)


class Render(Protocol):
    """Renders messages with marks; `variables` win over those of the conversation."""

    def __call__(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, **variables: Any
    ) -> Marked: ...


@dataclass(frozen=True, slots=True)
class Stops:
    """Tokens that end a turn."""

    special: Sequence[str]
    """All special tokens of the tokenizer."""
    end: Sequence[str]
    """Those at which a model stops: end of sequence, and the checkpoint's generation_config."""


def spans_by_message(
    render: Render, messages: Sequence[Message], marked: Marked, stops: Stops
) -> list[list[Span]]:
    """Return for each message its characters: what an assistant says, the region of another."""
    spans = [list(region) for region in marked.regions]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if marked.has_generation:
            spans[index] = _inside(marked.generations, marked.regions[index])
        else:
            spans[index] = _turn(render, messages, marked, index, stops)
    if not marked.has_generation:
        _check_regions(messages, marked)
    if sum(map(len, spans)) < len(marked.generations):
        raise underivable("a {% generation %} block lies outside the loop over the messages")
    return spans


def underivable(reason: str) -> ConfigError:
    """Return the error that says why a mask cannot be derived, and the way out."""
    return ConfigError(
        f"what the assistant says cannot be told from this chat template: {reason}", hint=WAY_OUT
    )


def _check_regions(messages: Sequence[Message], marked: Marked) -> None:
    """Refuse templates that write a tool's answer as part of the assistant's turn."""
    roles = [message["role"] for message in messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    for index in range(first, len(roles)):
        asked = roles[index] in ("user", "tool") and messages[index]["content"]
        if asked and not marked.regions[index]:
            raise underivable(f"message {index} ({roles[index]}) is written within another's turn")


def _inside(generations: Sequence[Span], region: Sequence[Span]) -> list[Span]:
    return [
        (start, end)
        for start, end in generations
        if any(first <= start and end <= last for first, last in region)
    ]


def _turn(
    render: Render, messages: Sequence[Message], marked: Marked, index: int, stops: Stops
) -> list[Span]:
    region = marked.regions[index]
    if not region:
        if messages[index]["content"]:
            raise underivable(f"message {index} is not rendered by a loop over the messages")
        return []
    if len(region) > 1:
        raise underivable(f"message {index} is rendered in {len(region)} places")
    ((start, end),) = region
    said = marked.text[start:end]
    header = _header(render, messages, index, said)
    length = _end(render, messages, index, said, marked.text[end:], stops)
    _check_said(index, messages[index], said[header:length])
    return [(start + header, start + length)]


def _check_said(index: int, message: Message, said: str) -> None:
    """Refuse templates that leave out a tool call, or change the words."""
    for call in message.get("tool_calls", ()):
        name = call.get("function", call).get("name", "")
        if name not in said:
            raise ConfigError(
                f"the chat template does not write the tool calls of message {index}",
                hint='write them into the content, or use a chat template that does ("tool_use")',
            )
    content = message["content"]
    plain = isinstance(content, str) and "<" not in content and "tool_calls" not in message
    if plain and content.strip() not in said:
        raise underivable(f"message {index} is not written as it is: {said!r}")


def _header(render: Render, messages: Sequence[Message], index: int, said: str) -> int:
    """Return how many characters of the turn the generation prompt gives already."""
    prompt = ""
    for candidate in _generation_prompts(render, messages[:index]):
        if candidate and said.startswith(candidate):
            return len(candidate)
        prompt = prompt or candidate
    before, _ = _around_probe(render, messages, index)
    if not prompt:  # such as [INST] ... [/INST]: white space before the answer is generated
        return len(before) if before.strip() and said.startswith(before) else 0
    # A prompt that opens a thinking block, which this turn does not have (or no longer has).
    shared = _common_prefix(prompt, before)
    if shared not in (prompt, before) or not said.startswith(shared):
        raise underivable(
            f"message {index} begins with {said[:40]!r}, which does not follow the generation "
            f"prompt {prompt!r}"
        )
    return len(shared)


def _generation_prompts(render: Render, messages: Sequence[Message]) -> Iterator[str]:
    """Give what a prompt of `messages` ends with behind the last message, first as it is set up.

    Then with and without thinking: an earlier turn may have been rendered the other way.
    """
    if not messages:
        return
    for variables in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        try:
            prompt = render(messages, add_generation_prompt=True, **variables)
        except TemplateError:  # the template wants more messages than these
            return
        ends = [end for region in prompt.regions for _, end in region]
        yield prompt.text[max(ends) :] if ends else ""


def _end(
    render: Render,
    messages: Sequence[Message],
    index: int,
    said: str,
    behind: str,
    stops: Stops,
) -> int:
    """Return how many characters of the turn there are up to where the model has to stop."""
    stripped = said.rstrip()
    if any(stripped.endswith(token) for token in stops.special):
        return len(stripped)
    for token in stops.end:  # the start of the next turn ends this one, as in GLM-4
        if behind.startswith(token):
            return len(said) + len(token)
    _, after = _around_probe(render, messages, index)
    return len(stripped) if after.strip() else len(said)


def _around_probe(render: Render, messages: Sequence[Message], index: int) -> tuple[str, str]:
    """Return what a turn has before and behind its content when it has nothing but content."""
    plain: dict[str, Any] = {"role": "assistant", "content": PROBE}
    try:
        probed = render([*messages[:index], plain, *messages[index + 1 :]])
    except TemplateError as error:
        raise underivable(f"it refuses text as message {index}: {error}") from error
    said = "".join(probed.text[start:end] for start, end in probed.regions[index])
    before, found, after = said.partition(PROBE)
    if not found:
        raise underivable(f"it does not write the content of message {index}")
    return before, after


def _common_prefix(left: str, right: str) -> str:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return left[:length]
