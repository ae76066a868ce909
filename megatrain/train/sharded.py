"""Trained parameters as flat float32 buffers: gradients summed, masters split over DP ranks.

P entries of one kind (dense or expert) on this rank, padded to P' = n * Q for the n ranks that
hold the same parameters and see other tokens.  Each of them owns Q master weights and their
optimizer state (ZeRO stage 1, Rajbhandari et al., arXiv:1910.02054).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.model.tensor_slice import TrainedParameter
from megatrain.parallel.groups import Groups


class ShardedParameters:
    """All dense, or all expert, parameters of one adapter on this rank."""

    def __init__(
        self, trained: Sequence[TrainedParameter], groups: Groups, *, is_expert: bool
    ) -> None:
        self.data_group = groups.expert_data if is_expert else groups.data
        self.tp_group = groups.expert_tp if is_expert else groups.tp
        # Replicated parameters first, so that one all-reduce over TP covers them.
        ordered = sorted(trained, key=lambda t: not t.is_replicated)
        self.parameters = [t.parameter for t in ordered]
        self.num_replicated = sum(t.parameter.numel() for t in ordered if t.is_replicated)
        self.ties = [t.tie for t in ordered]
        self.tie_group = groups.embedding
        size = sum(p.numel() for p in self.parameters)
        ranks, rank = self.data_group.size(), self.data_group.rank()
        self.shard_size = -(-size // ranks)
        self.mine = slice(rank * self.shard_size, (rank + 1) * self.shard_size)
        device = self.parameters[0].device if self.parameters else groups.device
        self.grad_P = torch.zeros(self.shard_size * ranks, device=device)
        self.master_Q = torch.nn.Parameter(torch.zeros(self.shard_size, device=device))
        self._hook_gradients()
        self.read_parameters()

    def _views(self, flat: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters]
        pieces = flat[: sum(sizes)].split(sizes)
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]

    def _hook_gradients(self) -> None:
        """Add each gradient to the float32 buffer as soon as it is there, and free it."""
        for parameter, view in zip(self.parameters, self._views(self.grad_P), strict=True):
            parameter.requires_grad_()

            def accumulate(p: Tensor, view: Tensor = view) -> None:
                if p.grad is not None:
                    view.add_(p.grad)
                    p.grad = None

            parameter.register_post_accumulate_grad_hook(accumulate)

    @torch.no_grad()
    def read_parameters(self) -> None:
        """Take master weights from the parameters' present values.  No communication."""
        flat = torch.zeros_like(self.grad_P)
        for view, parameter in zip(self._views(flat), self.parameters, strict=True):
            view.copy_(parameter)
        self.master_Q.copy_(flat[self.mine])

    def reduce(self, scale: float) -> None:
        """Put the scaled sum of gradients over all ranks into master_Q.grad.  Collective."""
        if self.num_replicated and self.tp_group.size() > 1:
            dist.all_reduce(self.grad_P[: self.num_replicated], group=self.tp_group)
        for view, tie in zip(self._views(self.grad_P), self.ties, strict=True):
            if tie is not None:
                dist.all_reduce(view, group=self.tie_group)
        if self.data_group.size() > 1:
            shard = torch.empty_like(self.master_Q)
            dist.reduce_scatter_tensor(shard, self.grad_P, group=self.data_group)
        else:
            shard = self.grad_P.clone()
        self.master_Q.grad = shard.mul_(scale)

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of this rank's reduced gradients, each counted once, float64.

        What all TP ranks hold counts on the first of them, a tied embedding on the first stage.
        """
        grad = self.master_Q.grad
        assert grad is not None
        counted = torch.ones(self.grad_P.numel(), dtype=torch.bool, device=grad.device)
        if self.tp_group.rank() > 0:
            counted[: self.num_replicated] = False
        for view, tie in zip(self._views(counted), self.ties, strict=True):
            if tie == 1:
                view.fill_(False)
        return grad.double().square().masked_fill(~counted[self.mine], 0.0).sum()

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Copy master weights of all ranks into the parameters.  Collective over the data group."""
        flat = self.master_Q.detach()
        if self.data_group.size() > 1:
            flat = torch.empty_like(self.grad_P)
            dist.all_gather_into_tensor(flat, self.master_Q.detach(), group=self.data_group)
        for view, parameter in zip(self._views(flat), self.parameters, strict=True):
            parameter.copy_(view)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.grad_P.zero_()
        self.master_Q.grad = None
