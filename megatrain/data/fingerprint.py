"""Says whether a step on a data set is the one that was cached: its code, options and tokenizer."""

import functools
import hashlib
import inspect
import json
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher

logger = logging.getLogger(__name__)


def fingerprint(*parts: Any) -> str:
    """Return 32 hex digits that are the same, in every process, for equal parts.

    An object counts with the source of its classes and with its attributes, a tokenizer with its
    vocabulary, rules and chat template, and a function with its code and what it closes over
    (hashed by `datasets`).  An object with a method `fingerprint()` answers itself.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(repr(_describe(part, ())).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _describe(value: Any, above: tuple[int, ...]) -> Any:  # noqa: C901 - one case a kind
    """Return nested tuples of strings and numbers that say all of `value`."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if id(value) in above:
        return "above"
    above = (*above, id(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return ("mapping", *((repr(key), _describe(item, above)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return ("list", *(_describe(item, above) for item in value))
    if isinstance(value, set | frozenset):
        return ("set", *sorted(repr(_describe(item, above)) for item in value))
    if inspect.isclass(value):
        return _describe_class(value)
    if isinstance(value, functools.partial):
        return _describe([value.func, value.args, value.keywords], above)
    if callable(getattr(value, "fingerprint", None)):
        return (_describe_class(type(value)), str(value.fingerprint()))
    if hasattr(value, "backend_tokenizer"):
        return _describe_tokenizer(value)
    attributes = getattr(value, "__dict__", None)
    if inspect.isroutine(value) or not attributes:
        return (_source(value), _describe_class(type(value)), _hash(value))
    return (_describe_class(type(value)), _describe(attributes, above))


def _hash(value: Any) -> str:
    try:
        return str(Hasher.hash(value))
    except Exception as error:  # noqa: BLE001 - whatever an object raises when it is taken apart
        logger.warning("results of %r are not kept for the next run: %s", value, error)
        return uuid.uuid4().hex


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # built in, or typed at a prompt
        return ""


def _describe_class(kind: type) -> tuple[Any, ...]:
    """Return the names and the sources of a class and its bases, so that changed code counts."""
    bases = kind.__mro__[:-1]
    return tuple((base.__module__, base.__qualname__, _source(base)) for base in bases)


def _describe_tokenizer(tokenizer: Any) -> tuple[Any, ...]:
    """Leave out truncation and padding, which a fast tokenizer changes with each call."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("truncation", None)
    rules.pop("padding", None)
    special = getattr(tokenizer, "special_tokens_map", None)
    return (
        type(tokenizer).__qualname__,
        json.dumps(rules),
        repr(getattr(tokenizer, "chat_template", None)),
        repr(special),
    )
