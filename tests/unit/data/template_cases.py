"""Tokenizers and conversations for the tests of templates."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trl
from transformers import PreTrainedTokenizerFast

from megatrain.cli.quickstart.tokenizer import build_tokenizer
from megatrain.types import IGNORED_LABEL

TRL = Path(trl.__file__).parent / "chat_templates"
WORDS = ["hello world, what is the weather in Rome? I think it is sunny, 21 degrees. Thanks!"] * 3

TWO_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello world, what is it?"},
    {"role": "user", "content": "the weather?"},
    {"role": "assistant", "content": "sunny,\n\n  21 degrees"},
]
THINKING: list[dict[str, Any]] = [
    {"role": "user", "content": "the weather in Rome?"},
    {"role": "assistant", "reasoning_content": "Rome, hm", "content": "sunny"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL_USE: list[dict[str, Any]] = [
    {"role": "user", "content": "the weather in Rome?"},
    {"role": "assistant", "reasoning_content": "ask", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "21 degrees"},
    {"role": "assistant", "reasoning_content": "it is warm", "content": "sunny"},
]

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content']|trim + eos_token }}{% endif %}{% endfor %}"
)
"""Mistral-7B-Instruct-v0.1: no generation prompt, no header before an answer."""


def trl_template(name: str) -> str:
    return (TRL / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_for(chat_template: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with the special tokens that the template writes."""
    tokenizer = build_tokenizer(WORDS, vocab_size=330)
    angled = set(re.findall(r"<\|[a-zA-Z_]+\|>|<\uff5c[^<>]*?\uff5c>|<\w+_of_\w+>", chat_template))
    special = sorted(angled | ({"[INST]", "[/INST]"} if "[INST]" in chat_template else set()))
    tokenizer.add_special_tokens({"additional_special_tokens": special, "bos_token": "<bos>"})
    tokenizer.chat_template = chat_template
    return tokenizer


def labelled_texts(tokenizer: Any, encoded: Mapping[str, Any]) -> list[str]:
    """Return the text of each run of tokens with a label."""
    on = [label != IGNORED_LABEL for label in encoded["labels"]]
    return runs(tokenizer, encoded["input_ids"], on)


def runs(tokenizer: Any, ids: Sequence[int], on: Sequence[bool | int]) -> list[str]:
    """Return the text of each run of tokens for which `on` is true."""
    found: list[list[int]] = []
    before = False
    for token, now in zip(ids, map(bool, on), strict=True):
        if now and not before:
            found.append([])
        if now:
            found[-1].append(token)
        before = now
    return [tokenizer.decode(run) for run in found]
