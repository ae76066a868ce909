"""Where a plug-in's code comes from: a module, a file, or a hub repository.

What may be run is decided in plugins.py, before anything here is called.
"""

import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from megatrain.errors import ConfigError

_HUBS = {
    "hf": ("huggingface_hub", "hf_hub_download"),
    "ms": ("modelscope", "model_file_download"),
}
"""By scheme: package, and its function that takes (repository, file name) and returns a path."""


def attribute(spec: str) -> Any:
    """Return what "package.module:Name" says."""
    module_name, _, name = spec.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module_name):
        raise ConfigError(f"{module_name!r} of {spec!r} is not the name of a module")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"cannot import {module_name!r} of {spec!r}: {error}") from error
    return member(module, name)


def member(module: ModuleType, name: str) -> Any:
    """Return a module's `name`, which may have dots."""
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            public = sorted(known for known in vars(target) if not known.startswith("_"))
            raise ConfigError(
                f"{module.__name__} has no {name!r}", hint=f"it has {', '.join(public) or 'none'}"
            )
        target = getattr(target, part)
    return target


def load_file(path: Path) -> ModuleType:
    """Import a file; one with the same path and content is imported once."""
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]
    name = f"megatrain_plugin_{re.sub(r'\W', '_', path.stem)}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"not a Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and others look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def download(place: str, default_file: str) -> Path:
    """Return the local copy of the file that `place`, "hf://owner/repository[/file.py]", names."""
    match = re.fullmatch(r"(hf|ms)://([^/]+/[^/]+)(?:/(.+\.py))?", place)
    if match is None:
        raise ConfigError(
            f"{place!r} does not name a hub repository",
            hint='"hf://owner/repository:Name" or "ms://owner/repository/file.py:Name"',
        )
    scheme, repository, file_name = match.groups()
    package, function = _HUBS[scheme]
    try:
        fetch = getattr(importlib.import_module(package), function)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{scheme}:// needs the package {package}", hint=f"pip install {package}"
        ) from error
    try:
        return Path(fetch(repository, file_name or default_file))
    except Exception as error:
        raise ConfigError(f"cannot download {place!r}: {type(error).__name__}: {error}") from error
