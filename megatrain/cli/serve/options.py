"""From the options of `megatrain serve` to a ServiceConfig."""

import argparse
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatrain.config.service import ServiceConfig
from megatrain.errors import ConfigError

DEMO_NAME = "megatrain/demo"

RANKS = ("ranks", "tp", "pp", "cp", "ep", "address", "platform", "max_context_length")
"""Options that are fields of a served model."""
OF_A_MODEL = (
    *RANKS,
    *("name", "mixed_precision", "max_loras", "full_parameters", "fork_ranks"),
    *("sampler", "sampler_address", "sampler_devices", "sampler_tp", "live_every"),
)
"""All options that say what is served, and how."""
SERVICE = ("host", "port", "data", "database", "files", "log_format")
"""Options that are fields of the whole."""


def build_config(args: argparse.Namespace) -> ServiceConfig:
    """Return what the options ask for.  Raises ConfigError."""
    fields = _given(args, SERVICE)
    if args.no_keys:
        fields["keys"] = False
    _check_effect(args)
    if args.config is not None:
        return _parse(_from_file(args.config) | fields, str(args.config))
    path, name = args.model, args.model
    if args.demo:
        path, name = str(demo_folder(args) / "base"), DEMO_NAME
    fields["models"] = [_model(args, path, args.name or name)]
    return _parse(fields, "the options")


def _check_effect(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that would have no effect."""
    if args.out is not None and not args.demo:
        raise ConfigError("--out is where --demo makes its base", hint="leave it out")
    ignored = [name for name in OF_A_MODEL if getattr(args, name) not in (None, False)]
    if args.config is not None and ignored:
        options = ", ".join("--" + name.replace("_", "-") for name in ignored)
        raise ConfigError(
            f"{options} would have no effect: {args.config} says what is served",
            hint="write them into its [[models]]",
        )


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _from_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error


def _parse(fields: dict[str, Any], where: str) -> ServiceConfig:
    try:
        return ServiceConfig(**fields)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ConfigError(f"{where} do not make a service: {'; '.join(wrong)}") from None


def _model(args: argparse.Namespace, path: str, name: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if args.mixed_precision is not None or args.demo:
        options["mixed_precision"] = args.mixed_precision or "no"
    if args.max_loras is not None:
        options["max_loras"] = args.max_loras
    engine, address = args.sampler, args.sampler_address
    if engine is not None and "://" in engine:
        engine, address = "vllm", engine
    elif engine is None and address is not None:
        engine = "vllm"
    if args.full_parameters and engine is None:
        engine = "none"
    sampler = {
        "engine": engine,
        "address": address,
        "devices": args.sampler_devices,
        "tp": args.sampler_tp,
        "live_every": args.live_every,
    }
    return {
        "name": name,
        "path": path,
        "options": options,
        "full_parameters": args.full_parameters,
        "bus": {"fork_ranks": True} if args.fork_ranks else {},
        "sampler": {key: value for key, value in sampler.items() if value is not None},
        **_given(args, RANKS),
    }


def demo_folder(args: argparse.Namespace) -> Path:
    """Return the folder whose `base` is served with --demo."""
    return (args.out or Path("demo")).resolve()
