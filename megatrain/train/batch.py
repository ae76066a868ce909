"""From a global batch of data to this rank's packed micro-batches.

Data are packed into bins of at most a token budget, without padding to the longest; bins are
dealt to DP ranks; each sequence is padded only to what CP and sequence parallelism divide by.
Every rank makes the same plan from the same batch, so nothing is communicated.
"""

from collections.abc import Sequence

from megatrain.errors import DataError
from megatrain.model.microbatch import MicroBatch
from megatrain.parallel.groups import Groups
from megatrain.train.bins import Dealer
from megatrain.train.datum import BatchRules, Datum, read_content
from megatrain.train.loss_inputs import check_alike
from megatrain.train.pack import PackedDatum, Packer


class BatchPlan:
    """How a global batch is spread over micro-batches and DP ranks."""

    def __init__(
        self,
        data: Sequence[Datum],
        groups: Groups,
        rules: BatchRules,
        *,
        max_tokens: int | None = None,
        max_data: int | None = None,
    ) -> None:
        self.data, self.groups, self.rules = list(data), groups, rules
        mesh = groups.mesh
        self.unit = 1 if rules.loss is None else rules.loss.unit
        units = [self.data[i : i + self.unit] for i in range(0, len(self.data), self.unit)]
        self.dealer = Dealer(
            num_ranks=mesh.dp,
            rank=groups.collection.dp.rank(),
            multiple=mesh.pp if mesh.vpp > 1 else 1,
            max_tokens=max_tokens,
            max_data=max_data and max(1, max_data // self.unit),
        )
        bins = self.dealer.deal([sum(datum.size for datum in unit) for unit in units])
        self.bins = [[datum.index for i in members for datum in units[i]] for members in bins]
        self.num_slots = sum(datum.size for datum in data)

    @property
    def num_labels(self) -> int:
        """Labels in the whole batch."""
        return sum(datum.num_labels for datum in self.data)

    def read_by(self, rank: int) -> list[int]:
        """Return the data that a data parallel rank reads, in the order of the batch."""
        return sorted(
            index for members in self.bins[rank :: self.groups.mesh.dp] for index in members
        )

    def micro_batches(self) -> list[MicroBatch]:
        """Return this rank's micro-batches; every rank has as many.

        Data that were not read yet are read here.  Raises DataError.
        """
        mesh = self.groups.mesh
        rank = self.groups.collection.dp.rank()
        mine = [[self._read(self.data[i]) for i in b] for b in self.bins[rank :: mesh.dp]]
        alike = [(member.index, member.content.inputs) for members in mine for member in members]
        check_alike(self.rules.loss, alike)
        packer = Packer(self.groups, self.rules.loss)
        lengths = [packer.padded_lengths(members) for members in mine]
        if mesh.vpp > 1:  # the interleaved schedule knows one length only
            longest = max(sum(each) for each in lengths)
            lengths = [
                [*each, longest - sum(each)] if sum(each) < longest else each for each in lengths
            ]
        return [packer.pack(m, n) for m, n in zip(mine, lengths, strict=True)]

    def _read(self, datum: Datum) -> PackedDatum:
        return read_datum(datum, self.rules)


def read_datum(datum: Datum, rules: BatchRules) -> PackedDatum:
    """Return a datum with its content, which is read now if it was not.  Raises DataError."""
    content = datum.content
    if content is None:
        content = read_content(datum.index, datum.row, rules, datum.inputs)
        found = (len(content.input_ids_S), len(content.where_L))
        if found != (datum.size, datum.num_labels):
            raise DataError(
                f"datum {datum.index} says that it has {datum.size} tokens and "
                f"{datum.num_labels} labels; it has {found[0]} and {found[1]}"
            )
    return PackedDatum(datum.index, datum.start, content)
