"""Trained parameters that are sharded over the fsdp axis: what ShardedParameters is to whole ones.

P entries of one kind on the F ranks of the fsdp axis together; this rank keeps rows of each
parameter, p entries, cut once more into Q for each of the n ranks that hold the same rows (the
other data and context parallel ranks).  Gradients are summed over the F ranks while backward runs,
over the n ranks once a step.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatrain.model.fsdp import gather_rows, local
from megatrain.model.tensor_slice import TrainedParameter
from megatrain.parallel.groups import Groups
from megatrain.train.sharded import ShardedParameters


def make_shards(
    trained: Sequence[TrainedParameter], groups: Groups, *, is_expert: bool
) -> ShardedParameters:
    """Return the shards of these parameters, all of which are DTensors or none."""
    if trained and isinstance(trained[0].parameter, DTensor):
        sharded = FsdpParameters(trained, groups, is_expert=is_expert)
        return cast("ShardedParameters", sharded)
    return ShardedParameters(trained, groups, is_expert=is_expert)


class FsdpParameters:
    """ShardedParameters of this rank's rows; seen from outside, flat buffers are of all rows.

    `views`, `gather_flat` and `shard_of` deal with whole parameters, (P,); everything else is the
    rows' own.
    """

    def __init__(
        self, trained: Sequence[TrainedParameter], groups: Groups, *, is_expert: bool
    ) -> None:
        assert groups.fsdp is not None
        self._group = groups.fsdp.shards
        whole_of = {}
        of_rows = []
        for each in trained:
            rows = torch.nn.Parameter(local(each.parameter))  # shares the shard's memory
            whole_of[rows] = each
            of_rows.append(replace(each, parameter=rows))
        self._rows = ShardedParameters(of_rows, groups.of_shards(), is_expert=is_expert)
        self.trained = [whole_of[each.parameter] for each in self._rows.trained]
        self.size = sum(each.parameter.numel() for each in self.trained)
        self._hook_gradients()

    def __getattr__(self, name: str) -> Any:
        """Return what the rows have under this name."""
        return getattr(self._rows, name)

    def _hook_gradients(self) -> None:
        """Add each reduced gradient to the float32 buffer as soon as it is there, and free it."""
        views = self._rows.views(self._rows.grad_P)
        for trained, view in zip(self.trained, views, strict=True):

            def accumulate(p: Tensor, view: Tensor = view) -> None:
                if p.grad is not None:
                    view.add_(local(p.grad))
                    p.grad = None

            self.hooks.append(trained.parameter.register_post_accumulate_grad_hook(accumulate))

    def views(self, flat_P: Tensor) -> list[Tensor]:
        """Return parameter-shaped views of a flat buffer (P,), in the order of `trained`."""
        shapes = [each.parameter.shape for each in self.trained]
        pieces = flat_P[: self.size].split([shape.numel() for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def gather_flat(self, values_Q: Tensor) -> Tensor:
        """Return the entries (P,) of all ranks, on the parameters' device.

        Exact, in the dtype of `values_Q`.  Collective over the ranks of all replicas.
        """
        rows = self._rows.views(self._rows.gather_flat(values_Q))
        shapes = [each.parameter.shape for each in self.trained]
        return torch.cat([t.reshape(-1) for t in gather_rows(rows, shapes, self._group)])

    def shard_of(self, flat_P: Tensor) -> Tensor:
        """Return this rank's entries (Q,) of a flat buffer (P,), as a copy."""
        own = flat_P.new_zeros(self._rows.grad_P.shape)
        for whole, rows in zip(self.views(flat_P), self._rows.views(own), strict=True):
            first = self._group.rank() * -(-whole.shape[0] // self._group.size())
            rows.copy_(whole[first : first + len(rows)])
        return self._rows.shard_of(own)
