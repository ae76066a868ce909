"""Text to tokens and back, and chats to prompts, from a base's folder.  No transformers."""

import functools
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from megatrain.errors import ConfigError, DataError

Json = dict[str, Any]

MAX_TOKEN_CHARACTERS = 64
"""Tokens are shorter, but for long runs of white space."""
REFUSALS = (TypeError, ValueError, ArithmeticError, LookupError, RecursionError)
"""What templates raise for messages that they do not expect."""


class TextModel:
    """Tokenizer and chat template of one base."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError for a folder without a tokenizer.json."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{folder} has no tokenizer.json",
                hint="send prompts as token ids through the Tinker API",
            )
        self._tokenizer = Tokenizer.from_file(str(path))
        self._config = _json(folder / "tokenizer_config.json")
        self._template = _template(folder, self._config)
        self.stops = self._ends(folder)
        """Texts of the tokens that end an answer."""

    def _ends(self, folder: Path) -> tuple[str, ...]:
        said: Any = _json(folder / "generation_config.json").get("eos_token_id")
        if said is None:
            said = _json(folder / "config.json").get("eos_token_id")
        ids = said if isinstance(said, list) else [] if said is None else [said]
        texts = [self._tokenizer.id_to_token(each) for each in ids]
        texts.append(_text(self._config.get("eos_token")))
        return tuple(dict.fromkeys(text for text in texts if text))

    def encode(self, text: str, *, context: int, special: bool = True) -> tuple[int, ...]:
        """Return token ids; `special`: with what the tokenizer puts around a text.

        Raises DataError for what cannot be written in Unicode, and, before it costs seconds, for a
        text that is far too long for `context` tokens.
        """
        if len(text) > MAX_TOKEN_CHARACTERS * context:
            raise DataError(
                f"a text of {len(text)} characters is longer than the context of {context} tokens"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"this is no text in Unicode: {error}") from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text; `special`: with special tokens written out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=not special))

    def prompt(
        self, messages: list[Json], tools: list[Json] | None, more: Json, *, context: int
    ) -> tuple[int, ...]:
        """Return a chat's prompt, up to where the assistant begins, for `context` tokens.

        `more` are further variables of the template.  Raises DataError for a base without a
        template, and for messages that the template refuses.
        """
        if self._template is None:
            raise DataError(
                "this base has no chat template", hint="use /v1/completions with a prompt"
            )
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: _text(self._config.get(name)) or "" for name in names}
        known = {"messages": messages, "tools": tools, "add_generation_prompt": True}
        try:
            text = _environment().from_string(self._template).render({**tokens, **more, **known})
        except (TemplateError, *REFUSALS) as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, context=context, special=False)


@functools.lru_cache(maxsize=16)
def text_model(folder: Path) -> TextModel:
    """Return the text model of a folder, read once.  Raises ConfigError."""
    return TextModel(folder)


class _Generation(Extension):
    """`{% generation %}` marks for training what an assistant says; here it is only written."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda how: datetime.now().strftime(how)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """Write JSON without HTML's escapes, which Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _json(path: Path) -> Json:
    if not path.is_file():
        return {}
    said = json.loads(path.read_text(encoding="utf-8"))
    return said if isinstance(said, dict) else {}


def _text(token: Any) -> str | None:
    """Return a special token's text, which is written plainly or as an object."""
    said = token.get("content") if isinstance(token, dict) else token
    return said if isinstance(said, str) else None


def _template(folder: Path, config: Json) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    said = config.get("chat_template")
    if isinstance(said, list):  # several by name
        said = next((each["template"] for each in said if each.get("name") == "default"), None)
    return said if isinstance(said, str) else None
