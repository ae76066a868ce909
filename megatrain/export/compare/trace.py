"""What one process saw of a model's activations and gradients, as files; and all of them as one.

T tokens of a datum, F features.  A rank sees some tokens and some features of a module's output;
its pieces say which, so that they can be put together without any communication.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from megatrain.errors import ExportError

Floats = npt.NDArray[np.float32]
LOGPROBS = "log-probabilities"
"""The last point of a trace."""


def input_of(module: str) -> str:
    """Return the name of the point where a linear is entered."""
    return f"{module} (input)"


@dataclass(frozen=True, slots=True)
class Seen:
    """Which tokens and features of a whole output a process has, and where in its own tensor."""

    positions: Tensor
    """Of the tokens in the datum."""
    rows: Tensor
    """Of the process's tensor, without padding: one for each position."""
    features: Tensor | None = None
    """Of the whole output; None if the process has all of them."""
    columns: Tensor | None = None
    """Of the process's tensor, one for each feature; None for all of them, in order."""

    def choose(self, tensor: Tensor) -> Tensor:
        """Return these rows and columns of a tensor (..., F), as (T, F) in float32."""
        flat = tensor.detach().reshape(-1, tensor.shape[-1]).float().cpu()[self.rows]
        return (flat if self.columns is None else flat[:, self.columns]).contiguous().clone()


@dataclass
class Piece:
    """Some tokens and features of one point for one datum."""

    name: str
    """Of the module in the Hugging Face model, whose output it is; or `input_of` one."""
    datum: int
    seen: Seen
    value_TF: Tensor
    gradient_TF: Tensor | None = None


@dataclass
class Recorder:
    """Collects pieces in the order of execution."""

    pieces: list[Piece] = field(default_factory=list)

    def watch(
        self, name: str, datum: int, output: Tensor, seen: Seen, bias: Tensor | None = None
    ) -> None:
        """Keep what is seen of an output, and of its gradient when there is one."""
        piece = Piece(name, datum, seen, seen.choose(output if bias is None else output + bias))
        self.pieces.append(piece)
        if output.requires_grad:

            def keep(gradient: Tensor) -> None:
                piece.gradient_TF = seen.choose(gradient)

            output.register_hook(keep)

    def write(self, folder: Path, *, stage: int, rank: int) -> None:
        """Write what one process saw; stages are put in order when they are read."""
        tensors, entries = {}, []
        for index, piece in enumerate(self.pieces):
            tensors[f"{index}.value"] = piece.value_TF
            tensors[f"{index}.positions"] = piece.seen.positions.clone()
            if piece.seen.features is not None:
                tensors[f"{index}.features"] = piece.seen.features.clone()
            if piece.gradient_TF is not None:
                tensors[f"{index}.gradient"] = piece.gradient_TF
            entries.append({"name": piece.name, "datum": piece.datum})
        stem = f"trace-{stage:03d}-{rank:05d}"
        save_file(tensors, folder / f"{stem}.safetensors")
        (folder / f"{stem}.json").write_text(json.dumps(entries))


@dataclass(frozen=True, slots=True)
class Point:
    """A module's whole output, or what enters a linear, for each datum."""

    name: str
    values: dict[int, Floats]
    gradients: dict[int, Floats]


def read_trace(folder: Path) -> dict[str, Point]:
    """Return every point in the order of execution, put together from all processes.

    Raises ExportError if a part of one was seen by nobody.
    """
    parts: defaultdict[str, list[_Part]] = defaultdict(list)
    for file in sorted(folder.glob("trace-*.json")):
        tensors = load_file(file.with_suffix(".safetensors"))
        for index, entry in enumerate(json.loads(file.read_text())):
            part = _Part(
                entry["datum"],
                tensors[f"{index}.value"],
                tensors.get(f"{index}.gradient"),
                tensors[f"{index}.positions"],
                tensors.get(f"{index}.features"),
            )
            parts[entry["name"]].append(part)
    return {name: _join(name, each) for name, each in parts.items()}


@dataclass(frozen=True, slots=True)
class _Part:
    datum: int
    value: Floats
    gradient: Floats | None
    positions: npt.NDArray[np.int64]
    features: npt.NDArray[np.int64] | None


def _join(name: str, parts: Iterable[_Part]) -> Point:
    by_datum: defaultdict[int, list[_Part]] = defaultdict(list)
    for part in parts:
        by_datum[part.datum].append(part)
    values, gradients = {}, {}
    for datum, own in by_datum.items():
        values[datum] = _whole(name, own, [part.value for part in own])
        known = [part.gradient for part in own if part.gradient is not None]
        if len(known) == len(own):
            gradients[datum] = _whole(name, own, known)
    return Point(name, values, gradients)


def _whole(name: str, parts: list[_Part], pieces: list[Floats]) -> Floats:
    num_tokens = 1 + max(int(part.positions.max(initial=-1)) for part in parts)
    width = max(
        piece.shape[1] if part.features is None else 1 + int(part.features.max(initial=-1))
        for part, piece in zip(parts, pieces, strict=True)
    )
    whole = np.zeros((num_tokens, width), np.float32)
    seen = np.zeros((num_tokens, width), bool)
    for part, piece in zip(parts, pieces, strict=True):
        features = np.arange(width) if part.features is None else part.features
        whole[np.ix_(part.positions, features)] = piece
        seen[np.ix_(part.positions, features)] = True
    if name != LOGPROBS and not seen.all():
        raise ExportError(f"no rank saw all of {name}: {int((~seen).sum())} entries are missing")
    return whole


def rows_of(tensor: Tensor) -> int:
    """Return how many tokens an output has, whatever its other dimensions."""
    return tensor.numel() // tensor.shape[-1]
