"""`megatrain serve`: the Tinker-compatible service, with its ranks and samplers.

    megatrain serve --demo
    megatrain serve --model Qwen/Qwen3-8B --ranks 2 --tp 2 --sampler-devices 4-7
    megatrain serve --config service.toml

Tinker's clients set TINKER_BASE_URL and TINKER_API_KEY, OpenAI's base_url and api_key.
"""

import argparse
from pathlib import Path
from typing import Any

SIZES = ("tp", "pp", "cp", "ep")


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "serve",
        help="the Tinker-compatible service for many tenants, with a sampler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR_OR_ID", help="the base checkpoint")
    what.add_argument("--demo", action="store_true", help="a small model that is made on the spot")
    what.add_argument("--config", type=Path, metavar="TOML", help="fields of ServiceConfig")
    parser.add_argument("--name", help="how clients call the model (default: as it is given)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="of --demo: the base is DIR/base (default: ./demo)",
    )
    _add_ranks(parser)
    _add_sampler(parser)
    _add_service(parser)
    parser.set_defaults(run=run)


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("--ranks", type=int, metavar="N", help="processes on this host (default: 1)")
    for size in SIZES:
        ranks.add_argument(f"--{size}", type=int, metavar="N", help="of the layout (default: 1)")
    ranks.add_argument("--address", metavar="ADDRESS", help="megatrain workers that run already")
    ranks.add_argument("--platform", choices=("auto", "cpu", "cuda", "npu"))
    ranks.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="no is float32")
    ranks.add_argument("--max-loras", type=int, metavar="N", help="adapters on the device at once")
    ranks.add_argument("--max-context-length", type=int, metavar="TOKENS")
    ranks.add_argument(
        "--full-parameters",
        action="store_true",
        help="runs train all parameters, one at a time; nobody samples",
    )
    ranks.add_argument("--fork-ranks", action="store_true", help="quick start; CPU only")


def _add_sampler(parser: argparse.ArgumentParser) -> None:
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument(
        "--sampler",
        metavar="ENGINE",
        help="auto, vllm, transformers, none, or http://HOST:PORT of a vLLM server",
    )
    sampler.add_argument("--sampler-address", metavar="URL", help="of a vLLM server that runs")
    sampler.add_argument("--sampler-devices", metavar="LIST", help="such as 4-7")
    sampler.add_argument(
        "--sampler-tp", type=int, metavar="N", help="devices that vLLM splits over"
    )
    sampler.add_argument(
        "--live-every", type=int, metavar="STEPS", help="the newest adapter goes live by itself"
    )


def _add_service(parser: argparse.ArgumentParser) -> None:
    service = parser.add_argument_group("service")
    service.add_argument("--host", help="default: 127.0.0.1")
    service.add_argument("--port", type=int, help="default: 8000; 0 is any that is free")
    service.add_argument("--data", type=Path, metavar="DIR", help="database, journals, checkpoints")
    service.add_argument("--database", metavar="URL", help="SQLAlchemy's; default: SQLite in DIR")
    service.add_argument("--files", metavar="URL", help="where checkpoints are kept (fsspec)")
    service.add_argument("--log-format", choices=("text", "json"), help="default: text")
    service.add_argument("--no-keys", action="store_true", help="accept any key; loopback only")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal says stop; return the exit status."""
    # `--help` should answer at once.
    from megatrain.cli.serve.demo import demo_base, demo_job
    from megatrain.cli.serve.options import build_config, demo_folder
    from megatrain.service.run import serve

    config = build_config(args)

    job = demo_job(demo_folder(args)) if args.demo else None
    return serve(config, prepare=None if job is None else lambda: demo_base(job))
