"""A global batch of several adapters' data: checked each by its own loss, packed together.

As batch.py does for one adapter, but that data of one adapter stand together in a micro-batch.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatrain.model.microbatch import MicroBatch, WholeLabels
from megatrain.model.mixture import Mixture
from megatrain.parallel.groups import Groups
from megatrain.train.batch import read_datum
from megatrain.train.bins import Dealer
from megatrain.train.datum import BatchRules, Datum
from megatrain.train.loss_inputs import check_alike, stack_inputs
from megatrain.train.pack import PackedDatum, Packer


@dataclass(frozen=True, slots=True)
class Share:
    """One adapter's part of a batch."""

    name: str
    rules: BatchRules
    data: Sequence[Datum]
    """Their `start` is counted over all adapters' data."""
    divisor: float

    @property
    def num_labels(self) -> int:
        """Labels of its data."""
        return sum(datum.num_labels for datum in self.data)


class MixedPlan:
    """How the data of several adapters are spread over micro-batches and DP ranks."""

    def __init__(
        self, shares: Sequence[Share], groups: Groups, *, max_tokens: int | None = None
    ) -> None:
        self.shares, self.groups = list(shares), groups
        mesh = groups.mesh
        units = [
            (number, share.data[i : i + share.rules.loss.unit])
            for number, share in enumerate(self.shares)
            if share.rules.loss is not None
            for i in range(0, len(share.data), share.rules.loss.unit)
        ]
        dealer = Dealer(
            num_ranks=mesh.dp,
            rank=groups.collection.dp.rank(),
            multiple=mesh.pp if mesh.vpp > 1 else 1,
            max_tokens=max_tokens,
            max_data=None,
        )
        bins = dealer.deal([sum(datum.size for datum in unit) for _, unit in units])
        self.bins = [
            [(units[i][0], datum) for i in members for datum in units[i][1]] for members in bins
        ]
        self.num_slots = sum(datum.size for share in self.shares for datum in share.data)

    def read_by(self, rank: int, number: int) -> list[int]:
        """Return which of a share's data a data parallel rank reads, in the order of the share."""
        mine = self.bins[rank :: self.groups.mesh.dp]
        return sorted(datum.index for b in mine for each, datum in b if each == number)

    def micro_batches(self) -> list[MicroBatch]:
        """Return this rank's micro-batches.  Data that were not read yet are read here.

        Raises DataError.
        """
        mesh, packer = self.groups.mesh, Packer(self.groups, None)
        mine = self.bins[self.groups.collection.dp.rank() :: mesh.dp]
        read = [[(number, self._read(number, datum)) for number, datum in b] for b in mine]
        for number, share in enumerate(self.shares):
            own = [member for members in read for each, member in members if each == number]
            check_alike(share.rules.loss, [(m.index, m.content.inputs) for m in own])
        lengths = [packer.padded_lengths([m for _, m in members]) for members in read]
        if mesh.vpp > 1:  # the interleaved schedule knows one length only
            longest = max(sum(each) for each in lengths)
            lengths = [
                [*each, longest - sum(each)] if sum(each) < longest else each for each in lengths
            ]
        return [self._pack(packer, m, n) for m, n in zip(read, lengths, strict=True)]

    def _read(self, number: int, datum: Datum) -> PackedDatum:
        return read_datum(datum, self.shares[number].rules)

    def _pack(
        self, packer: Packer, members: list[tuple[int, PackedDatum]], lengths: list[int]
    ) -> MicroBatch:
        """Return a micro-batch; `members` are in the order of adapters."""
        batch = packer.pack([member for _, member in members], lengths)
        cp = self.groups.mesh.cp
        tokens, ends, parts = [], [0], []
        place = sequence = 0
        for number, share in enumerate(self.shares):
            own = [member for each, member in members if each == number]
            num_sequences = sum(len(member.content.lengths) for member in own)
            tokens.append(sum(lengths[sequence : sequence + num_sequences]) // cp)
            ends.append(ends[-1] + sum(len(member.content.where_L) for member in own))
            labels = batch.labels.sequence_M[ends[-2] : ends[-1]] - sequence
            inputs = stack_inputs(share.rules.loss, [(m.index, m.content.inputs) for m in own])
            to = labels.device
            given = {name: torch.from_numpy(value).to(to) for name, value in inputs.items()}
            parts.append(WholeLabels(labels, num_sequences, given))
            sequence += num_sequences
            place += tokens[-1]
        tokens[-1] += batch.input_ids_1T.shape[1] - place  # padding
        names = tuple(share.name for share in self.shares)
        squares = tuple(
            float(sum(n * n for each, m in members if each == number for n in m.content.lengths))
            for number in range(len(names))
        )
        mixture = Mixture(names, tuple(tokens), _label_counts(batch, ends), squares)
        batch.packed.mixture = mixture
        return replace(batch, mixture=mixture, parts=tuple(parts))


def _label_counts(batch: MicroBatch, ends: Sequence[int]) -> tuple[int, ...]:
    """Return how many of this rank's labels are each adapter's; a dummy is the first one's."""
    if not batch.has_labels:
        return (1, *[0] * (len(ends) - 2))
    edges = torch.tensor(ends, device=batch.places_N.device)
    found = torch.searchsorted(batch.places_N.contiguous(), edges).tolist()
    return tuple(stop - start for start, stop in itertools.pairwise(found))
