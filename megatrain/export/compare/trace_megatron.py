"""A trace of this rank's part of a Megatron model: which tokens it sees, and the passes.

points.py says where a model is looked at.  One datum is in each micro-batch, so a token's place
comes from the packed batch alone and nothing is communicated.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.errors import ConfigError
from megatrain.export.compare.points import Point, points_of, split_output
from megatrain.export.compare.trace import LOGPROBS, Recorder, Seen, rows_of
from megatrain.model.microbatch import MicroBatch
from megatrain.model.network import Network
from megatrain.parallel.groups import Groups
from megatrain.train.batch import BatchPlan
from megatrain.train.datum import BatchRules, check_batch
from megatrain_kernels.segments import local_positions


@dataclass(frozen=True, slots=True)
class _Tokens:
    """One micro-batch's tokens on this rank."""

    datum: int
    size: int
    positions: Tensor
    """Of every local token in the datum; `size` and above for padding."""


@dataclass
class _Tracer:
    groups: Groups
    tokens: list[_Tokens]
    recorder: Recorder = field(default_factory=Recorder)
    calls: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Forward passes of each point so far: micro-batches come in order on every stage."""

    def hook(self, point: Point) -> None:
        """Watch a point in every forward pass."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.watch(point, args[0] if args else kwargs["hidden_states"], None)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.watch(point, *split_output(output))

        if point.is_input:
            point.module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            point.module.register_forward_hook(after)

    def watch(self, point: Point, output: Tensor, bias: Tensor | None) -> None:
        """Keep the tokens of the datum whose turn it is at this point."""
        tokens = self.tokens[self.calls[point.name]]
        self.calls[point.name] += 1
        positions, tp = tokens.positions, self.groups.tp
        if rows_of(output) != len(positions):  # sequence parallelism: this rank's share of them
            share = len(positions) // tp.size()
            assert rows_of(output) == share, (point.name, output.shape, len(positions))
            positions = positions[tp.rank() * share : (tp.rank() + 1) * share]
        rows = (positions < tokens.size).nonzero().flatten()
        seen = Seen(positions[rows], rows, point.features, point.columns)
        self.recorder.watch(point.name, tokens.datum, output, seen, bias)

    def loss(self, rows_RN: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the sum of -log p of this rank's tokens, and what the schedule keeps."""
        tokens = self.tokens[self.calls[LOGPROBS]]
        self.calls[LOGPROBS] += 1
        kept = rows_RN[:1].detach()
        if not batch.has_labels:
            return rows_RN.sum() * 0.0, kept
        column = rows_RN[0][:, None]
        positions = tokens.positions[batch.label_index_N.cpu()] + 1
        seen = Seen(positions, torch.arange(len(column)))
        self.recorder.watch(LOGPROBS, tokens.datum, column, seen)
        return -column.sum(), kept


def trace_network(network: Network, data: Sequence[Any], folder: Path, *, adapter: str) -> None:
    """Run data forward and backward under an adapter, and write what this rank sees.  Collective.

    The loss is the sum of -log p of all tokens.  Raises ConfigError for a layout with dp or vpp.
    """
    groups = network.groups
    if groups.mesh.dp > 1 or groups.mesh.vpp > 1:
        raise ConfigError(
            f"--layers compares layouts without dp and vpp: {groups.mesh.describe()}",
            hint="these change neither what a module computes nor how it is split",
        )
    rules = BatchRules(network.vocab_size)
    plan = BatchPlan(check_batch(data, rules), groups, rules, max_data=1)
    batches = plan.micro_batches()
    tracer = _Tracer(groups, [_tokens(groups, plan, i, batch) for i, batch in enumerate(batches)])
    network.activate(adapter)
    (chunk,) = network.chunks
    if getattr(chunk, "pre_process", False):
        # The base is frozen: without a leaf in front of it there would be no gradient at all.
        embedding: Any = chunk.embedding
        embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    for point in points_of(network.table, chunk):
        tracer.hook(point)
    network.run(batches, tracer.loss, train=True)
    tracer.recorder.write(folder, stage=groups.collection.pp.rank(), rank=groups.rank)


def _tokens(groups: Groups, plan: BatchPlan, index: int, batch: MicroBatch) -> _Tokens:
    (datum,) = plan.bins[index]
    cp = groups.collection.cp
    ends = batch.packed.cu_seqlens_q.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(ends)]
    mine = local_positions(lengths, cp_size=cp.size(), cp_rank=cp.rank())
    return _Tokens(datum, plan.data[datum].size, torch.tensor(list(mine)))
