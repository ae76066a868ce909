"""From checked data to the tensors of one packed micro-batch, sharded over CP."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatrain.model.microbatch import MicroBatch, WholeLabels
from megatrain.parallel.groups import Groups
from megatrain.train.datum import Content
from megatrain.train.loss import Loss
from megatrain.train.loss_inputs import TEACHER_TOKENS, stack_inputs
from megatrain.types import IGNORED_LABEL
from megatrain_kernels.segments import local_positions
from megatrain_kernels.torch_backend.core_attention import packed_sequences


@dataclass(frozen=True, slots=True)
class PackedDatum:
    """A datum that this rank reads."""

    index: int
    """In the batch."""
    start: int
    """In the flat global result."""
    content: Content


class Packer:
    """Packs micro-batches for one rank."""

    def __init__(self, groups: Groups, loss: Loss | None) -> None:
        self.groups, self.loss = groups, loss
        self.scores = loss is not None and loss.uses_scores

    def padded_lengths(self, members: Sequence[PackedDatum]) -> list[int]:
        """Return padded lengths of all sequences; the last one may be padding alone."""
        mesh = self.groups.mesh
        each = 2 * mesh.cp if mesh.cp > 1 else 1
        lengths = [-(-n // each) * each for m in members for n in m.content.lengths]
        # Sequence parallelism splits this rank's tokens over TP.
        surplus = -sum(lengths) % (each * mesh.tp)
        if surplus or not lengths:
            lengths.append(surplus or each * mesh.tp)
        return lengths

    def pack(self, members: Sequence[PackedDatum], lengths: list[int]) -> MicroBatch:
        """Return one micro-batch of these data, whose sequences are padded to `lengths`."""
        flat = _Flat(sum(lengths))
        starts = iter(np.cumsum([0, *lengths]).tolist())
        for member in members:
            flat.put(member, starts, scores=self.scores)
        return self._to_tensors(flat, lengths, members)

    def _to_tensors(
        self, flat: "_Flat", lengths: list[int], members: Sequence[PackedDatum]
    ) -> MicroBatch:
        cp_group = self.groups.collection.cp
        positions = np.concatenate([np.arange(n) for n in lengths])
        mine = np.arange(len(positions))
        if cp_group.size() > 1:
            mine = np.array(
                local_positions(lengths, cp_size=cp_group.size(), cp_rank=cp_group.rank())
            )
        index = np.flatnonzero(flat.slots[mine] >= 0)
        has_labels = len(index) > 0
        if not has_labels:
            index = np.zeros(1, dtype=np.int64)
        where = mine[index]
        # The m-th label in the order of the data is the m-th slot that is used.
        places = np.where(flat.slots >= 0, np.cumsum(flat.slots >= 0) - 1, -1)
        inputs = stack_inputs(self.loss, [(m.index, m.content.inputs) for m in members])
        extra = None
        if len(inputs.get(TEACHER_TOKENS, ())):
            extra = self._tensor(inputs[TEACHER_TOKENS][np.maximum(places[where], 0)])
        return MicroBatch(
            input_ids_1T=self._tensor(flat.ids[mine][None]),
            positions_1T=self._tensor(positions[mine][None]),
            packed=packed_sequences(lengths, cp_group=cp_group, device=self.groups.device),
            label_index_N=self._tensor(index),
            targets_N=self._tensor(flat.targets[where]),
            places_N=self._tensor(places[where]),
            has_labels=has_labels,
            slots_N=self._tensor(flat.slots[where]),
            labels=WholeLabels(
                sequence_M=self._tensor(flat.sequences[flat.slots >= 0]),
                num_sequences=flat.num_sequences,
                inputs={name: self._tensor(values) for name, values in inputs.items()},
            ),
            squares=float(sum(n * n for m in members for n in m.content.lengths)),
            extra_targets_NK=extra,
        )

    def _tensor(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.groups.device)


class _Flat:
    """Packed tokens before CP splits them: token t predicts targets[t] into slots[t]."""

    def __init__(self, num_tokens: int) -> None:
        self.ids = np.zeros(num_tokens, dtype=np.int64)
        self.targets = np.zeros(num_tokens, dtype=np.int64)
        self.slots = np.full(num_tokens, -1, dtype=np.int64)
        self.sequences = np.zeros(num_tokens, dtype=np.int64)
        self.num_sequences = 0

    def put(self, member: PackedDatum, starts: Iterator[int], *, scores: bool) -> None:
        """Write a datum's sequences; labels move one to the left.

        With `scores` a sequence has one label, which belongs to its last token and stays there.
        """
        content, begin = member.content, 0
        for size in content.lengths:
            start, end = next(starts), begin + size
            self.ids[start : start + size] = content.input_ids_S[begin:end]
            if scores:
                where, slots = np.array([size - 1]), np.array([size - 1])
            else:
                labels = content.labels_S[begin:end]
                slots = np.flatnonzero(labels != IGNORED_LABEL)
                where = slots - 1
                self.targets[start + where] = labels[slots]
            self.slots[start + where] = member.start + begin + slots
            self.sequences[start : start + size] = self.num_sequences
            self.num_sequences += 1
            begin = end
