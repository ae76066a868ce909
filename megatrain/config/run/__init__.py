"""A whole training run as one TOML file: sections, defaults, and errors that name the key."""

from megatrain.config.run.config import RunConfig
from megatrain.config.run.read import parse, read

__all__ = ["RunConfig", "parse", "read"]
