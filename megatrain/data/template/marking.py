"""Render a chat template and tell which message each character comes from.

Every loop of the Jinja source is given a mark at the start of its body and one behind it.  A mark
writes something only while the loop runs over messages, so what the template itself sees and
writes stays as it was: without the marks the text must equal the tokenizer's own rendering, which
the caller checks.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template as JinjaTemplate
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from megatrain.data.template.tokens import Span

_OPEN, _SHUT = "\U0010fb01", "\U0010fb02"
"""Around a mark: private characters of Unicode."""
_MARK = re.compile(f"{_OPEN}(.*?){_SHUT}")
_BEGIN, _END = "megatrain_begin_message", "megatrain_end_loop"


@dataclass(frozen=True, slots=True)
class Marked:
    """A rendered conversation."""

    text: str
    regions: tuple[tuple[Span, ...], ...]
    """By message: the text that its turn of the loop wrote; adjacent pieces are one."""
    generations: tuple[Span, ...]
    """What stands in `{% generation %}` blocks; empty where the template has none."""
    has_generation: bool = False
    """The template has such a block, entered or not."""


def render_marked(
    source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> Marked:
    """Render the template `source` over `messages`; jinja2.TemplateError says what it refuses."""
    template, has_generation = _compile(source)
    marker = _Marker(messages)
    raw = template.render(
        messages=messages, **variables, **{_BEGIN: marker.begin, _END: marker.end}
    )
    return _read_marks(raw, len(messages), has_generation)


class _Marker:
    """What the marks call while one conversation is rendered."""

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self._index = {id(message): index for index, message in enumerate(messages)}
        self._open: set[int] = set()

    def begin(self, loop: int, item: Any) -> str:
        index = self._index.get(id(item))
        if index is None and loop not in self._open:
            return ""
        self._open.add(loop)
        return f"{_OPEN}b {loop} {-1 if index is None else index}{_SHUT}"

    def end(self, loop: int) -> str:
        if loop not in self._open:
            return ""
        self._open.discard(loop)
        return f"{_OPEN}e {loop}{_SHUT}"


@dataclass(slots=True)
class _Reading:
    """Marks seen so far: the stack of loops, each with the message that it is at."""

    loops: list[tuple[int, int]] = field(default_factory=list)
    pieces: dict[int, list[Span]] = field(default_factory=dict)
    generation_starts: list[int] = field(default_factory=list)
    generations: list[Span] = field(default_factory=list)

    def text(self, start: int, end: int) -> None:
        owner = self.loops[-1][1] if self.loops else -1
        if owner < 0 or start == end:
            return
        pieces = self.pieces.setdefault(owner, [])
        if pieces and pieces[-1][1] == start:
            start = pieces.pop()[0]
        pieces.append((start, end))

    def mark(self, words: Sequence[str], position: int) -> None:
        match words:
            case ["b", loop, index]:
                if self.loops and self.loops[-1][0] == int(loop):
                    self.loops.pop()
                self.loops.append((int(loop), int(index)))
            case ["e", _]:
                self.loops.pop()
            case ["g"]:
                self.generation_starts.append(position)
            case _:
                self.generations.append((self.generation_starts.pop(), position))


def _read_marks(raw: str, num_messages: int, has_generation: bool) -> Marked:
    reading, texts, position, at = _Reading(), [], 0, 0
    for match in _MARK.finditer(raw):
        texts.append(raw[at : match.start()])
        reading.text(position, position + len(texts[-1]))
        position += len(texts[-1])
        at = match.end()
        reading.mark(match[1].split(" "), position)
    texts.append(raw[at:])
    reading.text(position, position + len(texts[-1]))
    regions = tuple(tuple(reading.pieces.get(index, ())) for index in range(num_messages))
    return Marked("".join(texts), regions, tuple(sorted(reading.generations)), has_generation)


class _Generation(Extension):
    """`{% generation %}` as Transformers knows it, with marks around what it renders."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.TemplateData(f"{_OPEN}{word}{_SHUT}") for word in ("g", "h")]
        opened, shut = (nodes.Output([mark], lineno=line) for mark in marks)
        return [opened, nodes.Scope(body, lineno=line), shut]


class _MarkLoops(NodeTransformer):
    """Give each loop over a plain name its marks."""

    def __init__(self) -> None:
        self._count = 0

    def visit_For(self, node: nodes.For) -> Any:
        loop, self._count = self._count, self._count + 1
        self.generic_visit(node)
        if not isinstance(node.target, nodes.Name):
            return node
        item = nodes.Name(node.target.name, "load")
        node.body.insert(0, _call(_BEGIN, nodes.Const(loop), item))
        return [node, _call(_END, nodes.Const(loop))]


def _call(name: str, *arguments: nodes.Expr) -> nodes.Output:
    function = nodes.Name(name, "load")
    return nodes.Output([nodes.Call(function, list(arguments), [], None, None)])


@lru_cache(maxsize=32)
def _compile(source: str) -> tuple[JinjaTemplate, bool]:
    environment = _environment()
    tree = environment.parse(source)
    has_generation = any(_OPEN in data.data for data in tree.find_all(nodes.TemplateData))
    tree = _MarkLoops().visit(tree)
    tree.set_environment(environment)
    return environment.from_string(tree), has_generation


def _environment() -> ImmutableSandboxedEnvironment:
    """Return what Transformers renders chat templates with: its options, filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
    }
    environment.globals.update(functions)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
