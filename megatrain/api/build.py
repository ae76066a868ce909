"""Rewards, advantages, metrics and every other kind of plug-in by name, for a script's own use."""

from typing import Any

from megatrain.config import plugins


def build(
    kind: plugins.Kind, spec: Any, /, *, trust_remote_code: bool = False, **options: Any
) -> Any:
    """Return an instance of a class, or a function, of `kind`, with its options.

    `kind` is loss, metric, reward, advantage, preprocessor, filter, template, processor or patch.
    `spec` is a name that is built in, registered, or an entry point of "megatrain.<kind>";
    "package.module:Name"; or, with `trust_remote_code`, "folder/file.py:Name" or
    "hf://owner/repository:Name".  Raises ConfigError for an unknown name or option.
    """
    return plugins.build(kind, spec, options, trust_remote_code=trust_remote_code)
