"""A large batch on its way to ranks: sizes go to all of them, rows only to those that read them.

Rank 0 has the rows.  Every rank makes the same plan from keys and sizes, and then the rows follow.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
import torch
import torch.distributed as dist

from megatrain.bus.codec import decode, encode
from megatrain.bus.commands import (
    Command,
    Forward,
    ForwardBackward,
    ForwardBackwardMany,
    ForwardMany,
)
from megatrain.bus.model_host import ModelHost
from megatrain.errors import StateError
from megatrain.parallel.groups import Groups
from megatrain.parallel.layout import DeviceMesh
from megatrain.train.loss import Loss
from megatrain.train.mixed_step import own_loss
from megatrain.types import IGNORED_LABEL

Rows = list[dict[str, Any]]

SMALLEST = 1 << 18
"""Bytes of a command from which on it is scattered: below, one broadcast is faster."""


class ScatteredRow(Mapping[str, Any]):
    """A LazyRow whose content is here only if this rank reads it."""

    def __init__(
        self, key: str, num_tokens: int, num_labels: int, numbers: Collection[str]
    ) -> None:
        self.key, self.num_tokens, self.num_labels = key, num_tokens, num_labels
        self.numbers = numbers
        self.content: Mapping[str, Any] | None = None

    def _there(self) -> Mapping[str, Any]:
        if self.content is None:
            raise StateError(f"row {self.key} was not sent to this rank")
        return self.content

    def __getitem__(self, name: str) -> Any:
        return self._there()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._there())

    def __len__(self) -> int:
        return len(self._there())


class ScatteredBatch(Sequence[ScatteredRow]):
    """A global batch of such rows."""

    def __init__(self, rows: Sequence[ScatteredRow], groups: Groups) -> None:
        self.rows, self.groups = list(rows), groups
        self.num_received = 0
        """Bytes of rows that this rank was sent."""

    @overload
    def __getitem__(self, index: int) -> ScatteredRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[ScatteredRow]: ...
    def __getitem__(self, index: int | slice) -> ScatteredRow | list[ScatteredRow]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, wanted: Sequence[Sequence[int]]) -> None:
        """Have rank 0 send the rows that each data parallel rank reads.  Collective."""
        groups = self.groups
        if groups.rank == 0:
            self._send(wanted)
            return
        mine = wanted[data_rank(groups.mesh, groups.rank)]
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, 0, group=groups.control)
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(body, 0, group=groups.control)
        self.num_received = len(body)
        for index, content in zip(mine, decode(memoryview(body.numpy())), strict=True):
            self.rows[index].content = content

    def _send(self, wanted: Sequence[Sequence[int]]) -> None:
        groups = self.groups
        bodies: dict[int, torch.Tensor] = {}
        works = []
        for rank in range(1, groups.mesh.world_size):
            to = data_rank(groups.mesh, rank)
            if to not in bodies:
                data = encode([self.rows[index].content for index in wanted[to]])
                bodies[to] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            size = torch.tensor([len(bodies[to])])
            for each in (size, bodies[to]):
                works.append((dist.isend(each, rank, group=groups.control), each))
        for work, _ in works:
            assert work is not None
            work.wait()


def data_rank(mesh: DeviceMesh, rank: int) -> int:
    """Return the place of a rank on the data parallel axis: tp is fastest, then cp, then dp."""
    return rank // (mesh.tp * mesh.cp) % mesh.dp


def split(command: Command, host: ModelHost | None) -> tuple[Command, list[Rows]] | None:
    """Return a pass with descriptions in place of its rows, and the rows of each adapter.

    None if it is no pass, or its rows are not what they should be: then every rank is to see them,
    and to say so.
    """
    if host is None:
        return None
    parts: list[tuple[Any, Rows] | None]
    match command:
        case ForwardBackward() | Forward():
            parts = [_split(command, host.loss(command.adapter))]
            whole: Any = parts[0] and parts[0][0]
        case ForwardBackwardMany() | ForwardMany():
            parts = [
                _split(each, own_loss(each) or host.loss(each.adapter)) for each in command.batches
            ]
            whole = replace(command, batches=[each[0] for each in parts if each is not None])
        case _:
            return None
    if any(each is None for each in parts):
        return None
    return whole, [each[1] for each in parts if each is not None]


def _split(part: Any, loss: Loss | None) -> tuple[Any, Rows] | None:
    """Return a command, or an adapter's batch, with descriptions in place of rows, and the rows."""
    rows = _with_columns(part.inputs, part.loss_inputs, loss)
    if rows is None:
        return None
    described = [_describe(row) for row in rows]
    if any(each is None for each in described):
        return None
    return replace(part, inputs=described, loss_inputs={}), rows


def _with_columns(rows: Any, given: Mapping[str, Any], loss: Loss | None) -> Rows | None:
    """Return rows with the call's loss inputs among their columns."""
    columns = {name: each for name, each in given.items() if each is not None}
    if not isinstance(rows, list) or loss is None or len(rows) % loss.unit:
        return None
    fits = all(
        name in loss.inputs and isinstance(column, list | np.ndarray) and len(column) == len(rows)
        for name, column in columns.items()
    )
    if not fits or not all(isinstance(row, dict) for row in rows):
        return None
    if any(name in row for row in rows for name in columns):
        return None
    return [
        row | {name: column[index] for name, column in columns.items()}
        for index, row in enumerate(rows)
    ]


def _describe(row: dict[str, Any]) -> list[Any] | None:
    """Return key, tokens, labels and names of numbers; None for what is no plain datum."""
    ids: Any = row.get("input_ids")
    labels: Any = ids if row.get("labels") is None else row["labels"]
    if not (_is_vector(ids) and _is_vector(labels)) or len(ids) != len(labels) or not len(ids):
        return None
    starts = _starts(row, len(ids))
    if starts is None:
        return None
    counted = np.array(labels)
    counted[starts] = IGNORED_LABEL
    numbers = [name for name in row if name not in ("input_ids", "labels")]
    key = hashlib.blake2b(encode(row), digest_size=16).hexdigest()
    return [key, len(ids), int((counted != IGNORED_LABEL).sum()), numbers]


def _is_vector(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu"


def _starts(row: dict[str, Any], size: int) -> Any:
    """Return where the sequences of a datum begin; None if that cannot be told."""
    lengths, positions = row.get("lengths"), row.get("position_ids")
    if lengths is not None:
        if not _is_vector(lengths) or not len(lengths) or lengths.sum() != size:
            return None
        return np.cumsum([0, *lengths[:-1]])
    if positions is None:
        return np.zeros(1, dtype=np.int64)
    return np.flatnonzero(positions == 0) if _is_vector(positions) else None


def joined(command: Any, rows: Sequence[Rows] | None, groups: Groups) -> Any:
    """Return a pass whose inputs are ScatteredBatches; rank 0 gives the rows."""
    if not isinstance(command, ForwardBackwardMany | ForwardMany):
        return replace(command, inputs=_joined(command.inputs, rows[0] if rows else None, groups))
    batches = [
        replace(each, inputs=_joined(each.inputs, rows[number] if rows else None, groups))
        for number, each in enumerate(command.batches)
    ]
    return replace(command, batches=batches)


def _joined(descriptions: Any, rows: Rows | None, groups: Groups) -> ScatteredBatch:
    batch = ScatteredBatch([ScatteredRow(*each) for each in descriptions], groups)
    for row, content in zip(batch.rows, rows or (), strict=False):
        row.content = content
    return batch
