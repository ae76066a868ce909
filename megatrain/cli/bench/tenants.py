"""`megatrain bench tenants`: data of many adapters in one pass, and one adapter after the other.

Both through the bus, on the same ranks, in turns; the run ends with an error if they do not compute
the same losses.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatrain.cli.bench.make import make_checkpoint
from megatrain.cli.bench.progress import Progress, check_file
from megatrain.cli.bench.shapes import SHAPES

AXES = ("tp", "pp", "cp", "ep", "dp")
RANKS = (1, 2, 4, 8, 16, 32, 64)
"""Of the tenants' adapters, in turn."""
SAME = 1e-4
"""Largest difference of two losses, which are about 10, in float32; 100 times that in bfloat16."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run found: seconds are medians of a forward_backward for all tenants."""

    shape: str
    layout: str
    dtype: str
    tenants: int
    data: int
    """Of each tenant."""
    tokens: int
    """Of each datum."""
    together_s: float
    in_turn_s: float
    difference: float
    """Largest difference between losses of the two."""

    @property
    def ratio(self) -> float:
        """How many times faster together is."""
        return self.in_turn_s / self.together_s


def add_parser(kinds: Any) -> None:
    """Declare the command and its options."""
    parser = kinds.add_parser(
        "tenants", help="many adapters in one pass, and one after the other", description=__doc__
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bf16"))
    parser.add_argument("--tenants", type=int, default=8, help="adapters (default 8)")
    parser.add_argument("--data", type=int, default=1, help="data of each (default 1)")
    parser.add_argument("--tokens", type=int, default=64, help="of each datum (default 64)")
    parser.add_argument("--repeats", type=int, default=5, help="medians of so many (default 5)")
    for axis in AXES:
        parser.add_argument(f"--{axis}", type=int, default=1, help="(default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the checkpoint there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write the file; return 0.  Raises ConfigError."""
    from megatrain.errors import ConfigError

    check_file(args.out)
    if min(args.tenants, args.data, args.repeats) < 1 or args.tokens < 2:
        raise ConfigError(
            "a benchmark needs tenants, data and repeats of at least 1, and tokens of at least 2"
        )
    with tempfile.TemporaryDirectory(prefix="megatrain-bench-") as name:
        folder, say = Path(name), Progress()
        job = _job(args, folder)
        say(f"{job.shape_name}: making or finding the checkpoint in {job.checkpoint}")
        make_checkpoint(job, job.write())
        found = measure(args, job, say)
    if args.out is not None:
        args.out.write_text(json.dumps(asdict(found) | {"ratio": found.ratio}, indent=2) + "\n")
    print(describe(found))
    return 0


def _job(args: argparse.Namespace, folder: Path) -> Any:
    """Return what the checkpoint is made from.  Raises ConfigError or LayoutError."""
    from megatrain.cli.bench.job import Job
    from megatrain.parallel.layout import DeviceMesh

    mesh = DeviceMesh(**{axis: getattr(args, axis) for axis in AXES})
    return Job.asked(args, folder, mesh, threads=1, repeats=args.repeats, seed=args.seed)


def describe(found: Measured) -> str:
    """Return the figures in two lines."""
    tokens = found.tenants * found.data * found.tokens
    return (
        f"{found.tenants} tenants, {found.data} x {found.tokens} tokens each, {found.shape}, "
        f"{found.dtype}, layout {found.layout}\n"
        f"one pass {found.together_s:.4f} s ({tokens / found.together_s:,.0f} tokens/s), in turn "
        f"{found.in_turn_s:.4f} s ({tokens / found.in_turn_s:,.0f} tokens/s): {found.ratio:.2f}x; "
        f"losses differ by {found.difference:.1e}"
    )


def measure(args: argparse.Namespace, job: Any, say: Progress) -> Measured:
    """Start ranks, run both ways in turns, and return the medians."""
    import megatrain
    from megatrain.cli.bench.job import DTYPES

    mesh, dtype = job.mesh, job.dtype
    say(f"starting {mesh.world_size} rank(s)")
    megatrain.initialize(mode="driver", global_device_mesh=mesh, seed=args.seed)
    try:
        model = megatrain.MegatronModel(str(job.checkpoint), mixed_precision=DTYPES[dtype])
        data = _tenants(model, args)
        _turn(model, data)  # warm-up
        turns = []
        for number in range(args.repeats):
            say(f"round {number + 1} of {args.repeats}")
            turns.append(_turn(model, data))
    finally:
        megatrain.shutdown()
    difference = max(turn[2] for turn in turns)
    bound = SAME if dtype == "float32" else 100 * SAME
    if difference > bound:
        raise RuntimeError(f"losses differ by {difference:g} (bound {bound:g}): not the same work")
    return Measured(
        args.shape,
        mesh.describe(),
        dtype,
        args.tenants,
        args.data,
        args.tokens,
        statistics.median(turn[0] for turn in turns),
        statistics.median(turn[1] for turn in turns),
        difference,
    )


def _tenants(model: Any, args: argparse.Namespace) -> dict[str, list[dict[str, list[int]]]]:
    """Make the adapters; return each one's data."""
    rng = random.Random(args.seed)
    vocabulary = SHAPES[args.shape].fields["vocab_size"]
    data = {}
    for number in range(args.tenants):
        name = f"tenant{number}"
        rank = RANKS[number % len(RANKS)]
        lora = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
        model.add_adapter_to_model(name, lora)
        data[name] = [
            {"input_ids": [rng.randrange(vocabulary) for _ in range(args.tokens)]}
            for _ in range(args.data)
        ]
    return data


def _turn(model: Any, data: dict[str, list[Any]]) -> tuple[float, float, float]:
    """Return seconds of one pass for all, seconds of one pass each, and how losses differ."""
    rows = [row for mine in data.values() for row in mine]
    names = [name for name, mine in data.items() for _ in mine]
    began = time.perf_counter()
    together = model.forward_backward(inputs=rows, adapter_name=names)
    between = time.perf_counter()
    alone = {
        name: model.forward_backward(inputs=mine, adapter_name=name) for name, mine in data.items()
    }
    ended = time.perf_counter()
    for name in data:
        model.zero_grad(adapter_name=name)
    difference = max(abs(together.adapters[n].loss - alone[n].loss) for n in data)
    return between - began, ended - between, difference
