"""An adapter that makes one checkpoint of another: the difference of each matrix, at low rank.

What a LoRA adapter cannot hold, and differs, is refused by name unless it is to be left out.
"""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.config.lora import LoraSpec, without_expert
from megatrain.errors import ExportError
from megatrain.export.adapters.base import open_base
from megatrain.export.adapters.delta import merged
from megatrain.export.adapters.deltas_of import EMBEDDING, HEAD, deltas_of
from megatrain.export.adapters.low_rank import Factors, check_rank, decompose
from megatrain.export.adapters.peft_file import read_peft
from megatrain.export.peft_adapter import AdapterFiles, prepare_adapter
from megatrain.export.skeleton import Place, Skeleton


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints with the same tensors, and which of those may be different."""

    base: SafetensorsFolder
    tuned: SafetensorsFolder
    config: dict[str, Any]
    skeleton: Skeleton
    rank: int
    ignored: Sequence[str]

    def largest_adapter(self, itemsize: int) -> int:
        """Return the bytes of an adapter on every matrix of the model."""
        shapes = [shape for shape in self.base.shapes().values() if len(shape) > 1]
        numbers = sum(math.prod(s[:-2]) * (s[-2] + s[-1]) * self.rank for s in shapes)
        return numbers * itemsize

    @property
    def largest_matrix(self) -> int:
        """Return the bytes of the largest matrix in float32."""
        return 4 * max(math.prod(shape[-2:]) for shape in self.base.shapes().values())

    @property
    def num_bytes(self) -> int:
        """Bytes that are read."""
        return sum(
            math.prod(each.shape(name)) * each.dtype(name).itemsize
            for each in (self.base, self.tuned)
            for name in each
        )


@dataclass(frozen=True)
class Extracted:
    """The adapter, and how far base and adapter are from the tuned checkpoint."""

    files: AdapterFiles
    errors: dict[str, float]
    """Norm of what is left over that of the difference, by module; experts of a layer together."""
    relative_error: float
    """The same of all modules together."""
    ignored: list[str]
    """Tensors that differ and were left out, as was asked for."""


def plan_extract(base: Path, tuned: Path, *, rank: int, ignored: Sequence[str]) -> Comparison:
    """Compare what headers say.  Raises ExportError for another tensor or shape."""
    check_rank(rank)
    opened = open_base(base)
    one, other = opened.plain, open_base(tuned).plain
    shapes, theirs = one.shapes(), other.shapes()
    wrong = sorted(
        name for name in shapes.keys() | theirs.keys() if shapes.get(name) != theirs.get(name)
    )
    if wrong:
        raise ExportError(
            f"{len(wrong)} tensor(s) are in one checkpoint only, or of another shape: "
            f"{', '.join(wrong[:5])}",
            hint="extract needs two checkpoints of one model",
        )
    return Comparison(one, other, opened.config, Skeleton(opened.config), rank, ignored)


def extract(
    comparison: Comparison,
    progress: Callable[[int], None],
    *,
    base_model: str,
    dtype: torch.dtype = torch.float32,
) -> Extracted:
    """Return the adapter, at the rank asked for, that brings the base nearest to the other one.

    Scale is 1, alpha the rank.  Raises ExportError for a difference that LoRA cannot hold, and if
    there is none at all.
    """
    found: dict[str, Factors] = {}
    ignored: list[str] = []
    refused: list[str] = []
    for name in comparison.base:
        base, tuned = comparison.base[name], comparison.tuned[name]
        progress(base.nbytes + tuned.nbytes)
        if torch.equal(base, tuned.to(base.dtype)) and torch.equal(base.to(tuned.dtype), tuned):
            continue
        if any(fnmatch.fnmatchcase(name, each) for each in comparison.ignored):
            ignored.append(name)
        elif parts := _matrices(comparison.skeleton, name, base.dim()):
            for module, index, turned in parts:
                found[module] = _factors(base, tuned, index, comparison.rank, turned=turned)
        else:
            refused.append(name)
    if refused:
        raise ExportError(
            f"{len(refused)} tensor(s) differ that a LoRA adapter cannot hold: "
            f"{', '.join(refused[:5])}",
            hint="--ignore names what to leave out: '*norm*'",
        )
    if not found:
        raise ExportError("the two checkpoints are the same: there is nothing to extract")
    _untie(comparison, found)
    _fill_experts(comparison, found)
    return _result(comparison, found, ignored, base_model=base_model, dtype=dtype)


def verify_extract(comparison: Comparison, folder: Path) -> float:
    """Return what an adapter on disk leaves of the difference, in norms, adding it for real."""
    shapes = comparison.base.shapes()
    sources = {HEAD: next((name for name in shapes if name.endswith(EMBEDDING)), HEAD)}
    if HEAD not in shapes:
        shapes[HEAD] = shapes[sources[HEAD]]
    deltas, left, whole = deltas_of(read_peft(folder), comparison.config, shapes), 0.0, 0.0
    for name, found in deltas.of.items():
        stored = name if name in comparison.base else sources[name]
        base, tuned = comparison.base[stored].float(), comparison.tuned[stored].float()
        whole += float((tuned - base).double().square().sum())
        added = merged(base, tuple(base.shape), torch.float32, found)
        left += float((tuned - added).double().square().sum())
    return math.sqrt(left / whole)


def _matrices(skeleton: Skeleton, name: str, dims: int) -> list[tuple[str, int | None, bool]]:
    """Return canonical module, index and whether it is (in, out) of every matrix of a tensor."""
    if dims == 3:
        owner, _, leaf = skeleton.renamed(name).rpartition(".")
        module = skeleton.module(owner)
        if module is None or leaf not in skeleton.parameters_of(owner):
            return []
        turned = bool(getattr(module, "is_transposed", False))
        path, _, last = name.rpartition(".")
        experts = range(skeleton.parameters_of(owner)[leaf][0])
        return [(f"{path}.{e}.{last}", e, turned) for e in experts]
    place = _place(skeleton, name)
    if dims != 2 or place is None:
        return []
    return [(name.removesuffix(".weight"), None, place.kind == "embedding")]


def _place(skeleton: Skeleton, name: str) -> Place | None:
    if not name.endswith(".weight"):
        return None
    try:
        return skeleton.place(name.removesuffix(".weight"))
    except ExportError:
        return None


def _factors(base: Tensor, tuned: Tensor, index: int | None, rank: int, *, turned: bool) -> Factors:
    one, other = (each if index is None else each[index] for each in (base, tuned))
    difference = other.float() - one.float()
    return decompose(difference.T if turned else difference, rank)


def _untie(comparison: Comparison, found: dict[str, Factors]) -> None:
    """Adapt a tied head as the embedding is: PEFT adapts each of the two alone."""
    head = HEAD.removesuffix(".weight")
    name = next((each for each in found if f"{each}.weight".endswith(EMBEDDING)), None)
    tied = getattr(comparison.skeleton.model.config, "tie_word_embeddings", False)
    if name is not None and tied and HEAD not in comparison.base:
        own = found[name]
        found[head] = Factors(own.b.T.contiguous(), own.a.T.contiguous(), own.error, own.norm)


def _fill_experts(comparison: Comparison, found: dict[str, Factors]) -> None:
    """Give experts that did not change factors of zero where others of their layer changed.

    PEFT adapts all experts of a layer, and gate with up.
    """
    places = {module: _expert_place(comparison.skeleton, module) for module in found}
    wanted = {place.path for place in places.values() if place is not None}
    for name in comparison.base:
        dims = len(comparison.base.shape(name))
        for module, _, turned in _matrices(comparison.skeleton, name, dims):
            place = _expert_place(comparison.skeleton, module)
            if module not in found and place is not None and place.path in wanted:
                rows, columns = comparison.base.shape(name)[-2:]
                rows, columns = (columns, rows) if turned else (rows, columns)
                zeros = torch.zeros(comparison.rank, columns), torch.zeros(rows, comparison.rank)
                found[module] = Factors(*zeros, 0.0, 0.0)


def _expert_place(skeleton: Skeleton, module: str) -> Place | None:
    try:
        place = skeleton.place(module)
    except ExportError:
        return None
    return place if place.kind in ("part", "expert") else None


def _result(
    comparison: Comparison,
    found: Mapping[str, Factors],
    ignored: list[str],
    *,
    base_model: str,
    dtype: torch.dtype,
) -> Extracted:
    tensors: dict[str, Tensor] = {}
    squares: dict[str, tuple[float, float]] = {}
    for module, each in found.items():
        tensors |= {f"{module}.lora_A": each.a.to(dtype), f"{module}.lora_B": each.b.to(dtype)}
        error, norm = squares.get(without_expert(module), (0.0, 0.0))
        squares[without_expert(module)] = error + each.error**2, norm + each.norm**2
    spec = LoraSpec(
        r=comparison.rank, lora_alpha=comparison.rank, target_modules=tuple(sorted(squares))
    )
    files = prepare_adapter(spec, tensors, base_model=base_model, hf_config=comparison.config)
    error, norm = (sum(each[i] for each in squares.values()) for i in (0, 1))
    errors = {
        name: math.sqrt(error / norm) if norm else 0.0 for name, (error, norm) in squares.items()
    }
    return Extracted(files, errors, math.sqrt(error / norm), ignored)
