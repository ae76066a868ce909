"""What `megatrain convert verify` does with --text and --layers: one side after the other."""

import argparse
from pathlib import Path

from megatrain.cli.convert.verify_side import Side
from megatrain.errors import CheckpointError
from megatrain.export.compare.layers import LayersReport, compare_traces
from megatrain.export.compare.logprobs import LogprobsReport, compare_logprobs
from megatrain.export.compare.place import ADAPTER_CONFIG, recognise
from megatrain.export.compare.tokens import Datum, random_tokens, read_text
from megatrain.parallel.layout import DeviceMesh

TOLERANCES = {
    ("logprobs", "float32"): 1e-5,
    ("logprobs", "bfloat16"): 5e-2,
    ("layers", "float32"): 1e-4,
    ("layers", "bfloat16"): 5e-2,
}
"""What sums in another order may differ by: absolute for log-probabilities, else relative."""


def compare_computed(args: argparse.Namespace, a: Path, b: Path) -> LayersReport | LogprobsReport:
    """Compute both sides and compare them.  Raises what went wrong on either."""
    model_a, model_b = _model(a), _model(b)
    if args.adapter is not None and not (args.adapter / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"--adapter is no PEFT adapter: no {ADAPTER_CONFIG} in {args.adapter}"
        )
    sizes = {axis: getattr(args, axis) for axis in ("tp", "pp", "cp", "ep", "etp")}
    one = Side(model_a, None, args.reference, DeviceMesh(), args.dtype)
    other = Side(model_b, args.adapter, args.system, DeviceMesh(**sizes), args.dtype)
    if args.adapter is not None and a == b:
        # One checkpoint with one adapter: what is compared is what computes it.
        one = Side(model_a, args.adapter, args.reference, DeviceMesh(), args.dtype)
    data = _data(args, model_a)
    kind = "layers" if args.layers else "logprobs"
    given = args.tolerance
    tolerance = TOLERANCES[kind, args.dtype] if given is None else float(given)
    how = (one.describe(), other.describe())
    if args.layers:
        return compare_traces(one.trace(data), other.trace(data), tolerance=tolerance, how=how)
    return compare_logprobs(
        one.logprobs(data), other.logprobs(data), data, tolerance=tolerance, how=how
    )


def _model(path: Path) -> Path:
    """Return the folder of a model.  Raises CheckpointError for anything else."""
    place = recognise(path)
    is_model = place.kind == "hugging face" or (
        place.kind == "state" and (path / "config.json").is_file()
    )
    if not is_model:
        raise CheckpointError(
            f"--text and --layers compute with Hugging Face checkpoints; {path} is of the kind "
            f"{place.kind}",
            hint="give the checkpoint as A and B, and an adapter with --adapter",
        )
    return path


def _data(args: argparse.Namespace, model: Path) -> list[Datum]:
    return random_tokens(model) if args.text is None else read_text(args.text, model)
