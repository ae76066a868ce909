"""From a global batch of data to this rank's packed micro-batches.

Data are packed into bins of at most a token budget, without padding to the longest; bins are
dealt to DP ranks; each sequence is padded only to what CP and sequence parallelism divide by.
Every rank makes the same plan from the same batch, so nothing is communicated.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from megatrain.model.microbatch import MicroBatch
from megatrain.parallel.groups import Groups
from megatrain.train.datum import Datum
from megatrain.types import IGNORED_LABEL
from megatrain_kernels.segments import local_positions
from megatrain_kernels.torch_backend.core_attention import packed_sequences

DEFAULT_TOKENS_PER_MICROBATCH = 4096
"""Token budget when neither a budget nor a number of data is given."""


def plan_bins(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    multiple: int = 1,
    max_tokens: int | None = None,
    max_data: int | None = None,
) -> list[list[int]]:
    """Deal data into bins, a multiple of num_ranks * multiple of them, as even as can be.

    The longest datum goes first, each to the least full bin (longest processing time first,
    Graham 1969); bins are added until none is over `max_tokens` with more than one datum, or over
    `max_data`.  Bin b belongs to rank b % num_ranks.
    """
    unit = num_ranks * multiple
    budget = max_tokens or DEFAULT_TOKENS_PER_MICROBATCH
    need = -(-len(lengths) // max_data) if max_data else -(-sum(lengths) // budget)
    count = max(1, -(-min(need, len(lengths)) // unit)) * unit
    while True:
        bins = _deal(lengths, count, max_data)
        over = [b for b in bins if not max_data and len(b) > 1 and _total(b, lengths) > budget]
        if not over:
            return [sorted(b) for b in bins]
        count += unit


def _total(members: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in members)


def _deal(lengths: Sequence[int], count: int, max_data: int | None) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = np.zeros(count)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = int(np.argmin(loads))
        bins[target].append(index)
        loads[target] += lengths[index]
        if max_data and len(bins[target]) >= max_data:
            loads[target] = np.inf
    return bins


class BatchPlan:
    """How a global batch is spread over micro-batches and DP ranks."""

    def __init__(
        self,
        data: Sequence[Datum],
        groups: Groups,
        *,
        max_tokens: int | None = None,
        max_data: int | None = None,
    ) -> None:
        self.data, self.groups = list(data), groups
        mesh = groups.mesh
        self.bins = plan_bins(
            [len(datum.input_ids_S) for datum in data],
            num_ranks=mesh.dp,
            multiple=mesh.pp if mesh.vpp > 1 else 1,
            max_tokens=max_tokens,
            max_data=max_data,
        )
        self.num_slots = sum(len(datum.input_ids_S) for datum in data)

    @property
    def num_labels(self) -> int:
        """Labels in the whole batch."""
        return sum(datum.num_labels for datum in self.data)

    def micro_batches(self) -> list[MicroBatch]:
        """Return this rank's micro-batches; every rank has as many."""
        mesh = self.groups.mesh
        rank = self.groups.collection.dp.rank()
        mine = [[self.data[i] for i in b] for b in self.bins[rank :: mesh.dp]]
        lengths = [self._lengths(members) for members in mine]
        if mesh.vpp > 1:  # the interleaved schedule knows one length only
            longest = max(sum(each) for each in lengths)
            lengths = [
                [*each, longest - sum(each)] if sum(each) < longest else each for each in lengths
            ]
        return [self._pack(m, n) for m, n in zip(mine, lengths, strict=True)]

    def _lengths(self, members: Sequence[Datum]) -> list[int]:
        """Return padded lengths of these sequences; the last one may be padding alone."""
        mesh = self.groups.mesh
        each = 2 * mesh.cp if mesh.cp > 1 else 1
        lengths = [-(-len(m.input_ids_S) // each) * each for m in members]
        # Sequence parallelism splits this rank's tokens over TP.
        surplus = -sum(lengths) % (each * mesh.tp)
        if surplus or not lengths:
            lengths.append(surplus or each * mesh.tp)
        return lengths

    def _pack(self, members: Sequence[Datum], lengths: list[int]) -> MicroBatch:
        flat = _Flat(sum(lengths))
        for member, start in zip(members, np.cumsum([0, *lengths]), strict=False):
            flat.put(member, int(start))
        return self._to_tensors(flat, lengths)

    def _to_tensors(self, flat: "_Flat", lengths: list[int]) -> MicroBatch:
        mesh, device = self.groups.mesh, self.groups.device
        cp_group = self.groups.collection.cp
        positions = np.concatenate([np.arange(n) for n in lengths])
        mine = np.arange(len(positions))
        if mesh.cp > 1:
            mine = np.array(local_positions(lengths, cp_size=mesh.cp, cp_rank=cp_group.rank()))
        slots = flat.slots[mine]
        index = np.flatnonzero(slots >= 0)
        if not len(index):
            index = np.zeros(1, dtype=np.int64)

        def tensor(values: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        return MicroBatch(
            input_ids_1T=tensor(flat.ids[mine][None]),
            positions_1T=tensor(positions[mine][None]),
            packed=packed_sequences(lengths, cp_group=cp_group, device=device),
            label_index_N=tensor(index),
            targets_N=tensor(flat.targets[mine][index]),
            weights_N=tensor((slots[index] >= 0).astype(np.float32)),
            slots_N=tensor(slots[index]),
        )


class _Flat:
    """Packed tokens before CP splits them: token t predicts targets[t] into slots[t]."""

    def __init__(self, num_tokens: int) -> None:
        self.ids = np.zeros(num_tokens, dtype=np.int64)
        self.targets = np.zeros(num_tokens, dtype=np.int64)
        self.slots = np.full(num_tokens, -1, dtype=np.int64)

    def put(self, datum: Datum, start: int) -> None:
        """Write one datum; labels move one to the left."""
        size = len(datum.input_ids_S)
        self.ids[start : start + size] = datum.input_ids_S
        has_label = datum.labels_S[1:] != IGNORED_LABEL
        where = start + np.flatnonzero(has_label)
        self.targets[where] = datum.labels_S[1:][has_label]
        self.slots[where] = datum.start + 1 + np.flatnonzero(has_label)
