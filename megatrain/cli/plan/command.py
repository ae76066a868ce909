"""`megatrain plan`: layouts for a model on so many devices, with estimated memory and time."""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.errors import CheckpointError, ConfigError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

MODEL_TYPES = {"Qwen3Config": "qwen3", "Qwen3MoeConfig": "qwen3_moe"}
"""Of the benchmark's shapes, by Transformers' class."""


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "plan", help="which layouts fit, and how fast they may be", description=__doc__
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a checkpoint's folder, its config.json, a hub id, or a bench shape",
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="devices in all")
    parser.add_argument("--nodes", type=int, default=1, help="that they are in (default 1)")
    parser.add_argument("--device", default="h100", help="a100, h100, h200, b200 or cpu")
    parser.add_argument("--memory", help="of one device, such as 80GB (default: the device's)")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens (default 4096)")
    parser.add_argument(
        "--max-tokens", type=int, help="of a micro-batch (default: 4096, or one sequence)"
    )
    parser.add_argument("--batch-tokens", type=int, help="of a global batch")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--optimizer", default="AdamW")
    parser.add_argument(
        "--offload-optimizer", action="store_true", help="keep masters and moments on the host"
    )
    parser.add_argument("--recompute", action="store_true", help="recompute activations")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--lora-rank", type=int, default=16, help="on all linears (default 16)")
    kind.add_argument("--full", action="store_true", help="train all parameters")
    parser.add_argument("--top", type=int, default=8, help="layouts to show (default 8)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the layouts; return 0, or 1 if none fits."""
    from megatrain.cli.plan import report
    from megatrain.cli.plan.candidates import candidates

    config, cluster = load_config(args.model), make_cluster(args)
    found = candidates(config, make_training(args), cluster)
    if not found:
        raise ConfigError(
            f"no layout of {args.gpus} devices suits the model: tp must divide its heads, pp its "
            "layers",
            hint="try another number of devices",
        )
    shown = found[: args.top]
    if args.json:
        rows = [{"mesh": c.mesh.to_dict(), "fits": c.fits, **c.estimate.to_dict()} for c in shown]
        print(json.dumps(rows, indent=2))
    else:
        report.show(shown, cluster, len(found), sys.stdout)
    return 0 if found[0].fits else 1


def make_cluster(args: argparse.Namespace) -> Any:
    """Return the checked devices.  Raises ConfigError."""
    from megatrain.cli.plan.candidates import Cluster
    from megatrain.config.estimate.speed import find_device

    for name in ("gpus", "nodes", "top"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1: {getattr(args, name)}")
    if args.gpus % args.nodes:
        raise ConfigError(f"--gpus must be a multiple of --nodes: {args.gpus}, {args.nodes}")
    memory = find_device(args.device).memory
    if args.memory is not None:
        memory = parse_bytes(args.memory)
    return Cluster(args.device, args.gpus, args.gpus // args.nodes, memory)


def make_training(args: argparse.Namespace) -> Any:
    """Return what is trained.  Raises ConfigError."""
    from megatrain.config.estimate import Training

    lora = {"r": args.lora_rank, "lora_alpha": args.lora_rank, "target_modules": "all-linear"}
    return Training(
        precision=args.precision,
        lora=None if args.full else lora,
        optimizer=args.optimizer,
        offload_optimizer=args.offload_optimizer,
        recompute=args.recompute,
        sequence_length=args.seq_length,
        tokens_per_microbatch=args.max_tokens,
        tokens_per_step=args.batch_tokens,
    )


def load_config(model: str) -> Mapping[str, Any]:
    """Return the configuration of one of the benchmark's shapes, a folder, a file, or a hub's."""
    from megatrain.cli.bench.shapes import SHAPES
    from megatrain.config.estimate.model import read_config

    if model in SHAPES and not Path(model).exists():
        shape = SHAPES[model]
        kind = MODEL_TYPES.get(shape.config_class, shape.config_class)
        return {**shape.fields, "model_type": kind}
    if Path(model).exists():
        return read_config(model)
    return read_config(_locate(model))


def _locate(model: str) -> Path:
    """Return the folder of a hub's model, with its configuration alone."""
    from megatrain.checkpoint.locate import locate
    from megatrain.cli.bench.shapes import SHAPES

    try:
        return locate(model, ["config.json"])
    except CheckpointError as error:
        raise ConfigError(
            f"no checkpoint at {model!r}, and no shape of this name: {error.message}",
            hint=f"shapes: {', '.join(SHAPES)}",
        ) from error


def parse_bytes(text: str) -> int:
    """Return the bytes that `80GB`, `79.6 GiB` or a plain number mean.  Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS or not float(found[1]):
        raise ConfigError(f"not an amount of memory: {text!r}", hint="such as 80GB or 79.6GiB")
    return round(float(found[1]) * UNITS[found[2].lower()])
