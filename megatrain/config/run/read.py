"""From TOML text and `--set key=value` to a RunConfig; every mistake is named with its section."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatrain.config.run.config import RunConfig
from megatrain.config.run.sections import SourceSection
from megatrain.errors import ConfigError


def read(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, change the keys that `overrides` name, and check everything.

    Raises ConfigError for a file that cannot be read, an unknown key (with the nearest known one)
    or a value that cannot work.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return parse(values, overrides, source=str(path))


def parse(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "configuration"
) -> RunConfig:
    """Check values by section.  Raises ConfigError as `read` does."""
    changed: Any = _copy(values)
    for override in overrides:
        _override(changed, override)
    try:
        return RunConfig.model_validate(changed)
    except ValidationError as error:
        raise _explain(error, source) from error


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list | tuple) else value


def _override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key; a number in it is an index of a list."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set takes key=value: {override!r}", hint="--set train.batch_size=16")
    place: Any = values
    for position, part in enumerate(path[:-1]):
        place = _step(place, part, override, path[: position + 1])
    if isinstance(place, list):
        place[_index(place, path[-1], override)] = _value(text)
    else:
        place[path[-1]] = _value(text)


def _step(place: Any, part: str, override: str, path: list[str]) -> Any:
    if isinstance(place, list):
        inner = place[_index(place, part, override)]
    else:
        inner = place.setdefault(part, {})
        if isinstance(inner, str):  # "AdamW" stands for a table with this name
            inner = place[part] = {"name": inner}
    if not isinstance(inner, dict | list):
        raise ConfigError(f"--set {override}: {'.'.join(path)} is not a table: {inner!r}")
    return inner


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise ConfigError(
            f"--set {override}: {part!r} is not an index of a list of {len(items)}",
            hint=f"0 to {len(items) - 1}",
        )
    return int(part)


def _value(text: str) -> Any:
    """Return the text as TOML, or as it is where it is no TOML value (a bare word or path)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError, source: str) -> ConfigError:
    """Turn pydantic's report into one error that lists every mistake."""
    messages, hints = [], []
    for each in error.errors():
        place = [part for part in each["loc"] if not str(part).startswith("function-")]
        if each["type"] == "extra_forbidden":
            *section, key = place
            known = _known_keys(section)
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            did_you_mean = f"; did you mean {near[0]!r}?" if near else ""
            messages.append(f"unknown key {key!r} in {_section(section)}{did_you_mean}")
            hints.append(f"{_section(section)} has {', '.join(known)}")
            continue
        inner = each.get("ctx", {}).get("error")
        text = str(inner) if inner is not None else f"{each['msg']} ({each['input']!r})"
        if each["type"] == "missing":
            text = "is missing"
        messages.append(f"{_dotted(place)}: {text}" if place else text)
    return ConfigError(f"{source}: {'; '.join(messages)}", hint="; ".join(hints) or None)


def _section(place: Sequence[Any]) -> str:
    return f"[{_dotted(place)}]" if place else "the top level"


def _dotted(place: Sequence[Any]) -> str:
    return ".".join(str(part) for part in place)


def _known_keys(section: Sequence[Any]) -> list[str]:
    """Return the keys of a section, found by its path."""
    model: type[BaseModel] = RunConfig
    for part in section:
        if isinstance(part, int):
            model = SourceSection
            continue
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return [name for name, field in model.model_fields.items() if not field.exclude]
