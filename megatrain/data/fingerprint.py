"""Says whether a step on a data set is the one that was cached: its code, options and tokenizer."""

import copyreg
import functools
import hashlib
import inspect
import json
import logging
import sys
import sysconfig
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from datasets.fingerprint import Hasher

logger = logging.getLogger(__name__)

_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
_PACKAGE = __name__.partition(".")[0]
_digests: dict[str, tuple[object, str]] = {}
"""By module's name: its spec, which importlib.reload() replaces, and its file's digest."""


def fingerprint(*parts: Any) -> str:
    """Return 32 hex digits that are the same, in every process, for equal parts.

    An object counts with its classes' code and with its attributes, a tokenizer with its
    vocabulary, rules and chat template, a function with its code and what it closes over.  Code
    counts with the whole file it is in and the files, not of installed packages, that this one
    imports; of a script or a notebook, the functions and constants that it names.  This package's
    code for data always counts.  An object with a method `fingerprint()` answers itself.
    """
    digest = hashlib.blake2b(digest_size=16)
    describe = _Describer()
    for part in (_own_code(), *parts):
        digest.update(repr(describe(part, ())).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


class _Describer:
    """Says all of a value in nested tuples of strings and numbers."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Any]] = {}
        """Functions and classes that were met: they may call each other."""

    def __call__(self, value: Any, above: tuple[int, ...]) -> Any:  # noqa: C901 - a case a kind
        """Describe `value`, which is inside of the objects `above`."""
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return value
        if id(value) in above:
            return "above"
        above = (*above, id(value))
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, Mapping):
            return ("mapping", *((repr(key), self(item, above)) for key, item in value.items()))
        if isinstance(value, list | tuple):
            return ("list", *(self(item, above) for item in value))
        if isinstance(value, set | frozenset):
            return ("set", *sorted(repr(self(item, above)) for item in value))
        if isinstance(value, functools.partial):
            return self([value.func, value.args, value.keywords], above)
        if inspect.ismodule(value):
            return ("module", value.__name__, _code_of(value.__name__))
        if inspect.isclass(value) or inspect.isfunction(value):
            return self._code(value, above)
        if inspect.ismethod(value):
            return ("method", self(value.__self__, above), self(value.__func__, above))
        if callable(getattr(value, "fingerprint", None)):
            return (self(type(value), above), str(value.fingerprint()))
        if hasattr(value, "backend_tokenizer"):
            return _describe_tokenizer(value)
        if callable(wrapped := getattr(value, "__wrapped__", None)):
            return ("wrapped", self(type(value), above), self(wrapped, above))
        return self._instance(value, above)

    def _instance(self, value: Any, above: tuple[int, ...]) -> Any:
        kind = self(type(value), above)
        is_known, state = _state(value)
        return (kind, self(state, above)) if is_known else (kind, _hash(value))

    def _code(self, value: Any, above: tuple[int, ...]) -> Any:
        """Describe a class or a function once; later it is a number."""
        if id(value) in self._seen:
            return ("seen", self._seen[id(value)][0])
        self._seen[id(value)] = (len(self._seen), value)
        if inspect.isclass(value):
            return ("class", *(self._class(base, above) for base in value.__mro__[:-1]))
        return self._function(value, above)

    def _class(self, kind: type, above: tuple[int, ...]) -> Any:
        code = _code_of(kind.__module__)
        named = (kind.__module__, kind.__qualname__, code)
        if (code and "<locals>" not in kind.__qualname__) or kind.__module__ == "builtins":
            return named
        parts = vars(kind).values()
        functions = (getattr(part, "__func__", getattr(part, "fget", part)) for part in parts)
        return (
            *named,
            _source(kind),
            *(self(part, above) for part in functions if inspect.isfunction(part)),
        )

    def _function(self, function: FunctionType, above: tuple[int, ...]) -> Any:
        file = _code_of(function.__module__)
        names = sorted(_names(function.__code__))
        used = (
            {} if file else {n: v for n in names if (v := function.__globals__.get(n, n)) is not n}
        )
        cells = [_content(cell) for cell in function.__closure__ or ()]
        return (
            "function",
            *(file, function.__module__, function.__qualname__),
            _describe_code(function.__code__),
            self([function.__defaults__, function.__kwdefaults__, cells, used], above),
        )


def _state(value: Any) -> tuple[bool, Any]:
    """Return whether what an object holds is known, and what it is."""
    kind = type(value)
    is_plain = (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind not in copyreg.dispatch_table
    )
    if is_plain:
        try:
            return True, value.__reduce_ex__(2)[2]
        except TypeError:  # it holds something that Python does not see
            pass
    attributes = getattr(value, "__dict__", None)
    return bool(attributes), attributes


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return "empty"


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in a function and those in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _names(constant)


def _describe_code(code: CodeType) -> tuple[Any, ...]:
    return (code.co_code.hex(), code.co_names, tuple(map(_constant, code.co_consts)))


def _constant(value: Any) -> Any:
    """Describe a constant of code; the order of a set differs from process to process."""
    if inspect.iscode(value):
        return _describe_code(value)
    if isinstance(value, frozenset):
        return ("set", *sorted(repr(_constant(item)) for item in value))
    return tuple(map(_constant, value)) if isinstance(value, tuple) else repr(value)


def _code_of(name: str) -> str:
    """Return a digest of a module's file and of those that it imports; "" for a script's."""
    if not _file(name) or name == "__main__":
        return ""
    found: set[str] = set()
    _imported(name, found)
    total = hashlib.blake2b(digest_size=16)
    for module in sorted(found):
        total.update(f"{module} {_digest(module)} ".encode())
    return total.hexdigest()


def _imported(name: str, found: set[str]) -> None:
    """Add a module and those that it imports, but for what is in installed packages or in ours."""
    found.add(name)
    file = _file(name)
    if file.startswith(_INSTALLED) or name.partition(".")[0] == _PACKAGE:
        return
    for value in list(vars(sys.modules[name]).values()):
        is_module = isinstance(value, ModuleType)
        other = value.__name__ if is_module else getattr(value, "__module__", None)
        if isinstance(other, str) and other not in found | {"__main__"}:
            file = _file(other)
            if file and not file.startswith(_INSTALLED) and other.partition(".")[0] != _PACKAGE:
                _imported(other, found)


def _file(name: str) -> str:
    """Return the path of a module's file, "" where there is none."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return file if isinstance(file, str) and Path(file).is_file() else ""


def _digest(name: str) -> str:
    """Return the digest of a module's file as it was when the module was first met."""
    spec = getattr(sys.modules[name], "__spec__", None)
    known = _digests.get(name)
    if known is None or known[0] is not spec:
        known = (spec, hashlib.sha256(Path(_file(name)).read_bytes()).hexdigest())
        _digests[name] = known
    return known[1]


@functools.cache
def _own_code() -> str:
    """Return a digest of this package's code for data."""
    total = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        total.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return total.hexdigest()


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
