"""Trained parameters as flat float32 buffers: gradients summed, masters split over DP ranks.

P entries of one kind (dense or expert) on this rank, padded to P' = n * Q for the n ranks that
hold the same parameters and see other tokens.  Each of them owns Q master weights and their
optimizer state (ZeRO stage 1, Rajbhandari et al., arXiv:1910.02054).

The optimizer sees pieces: runs of those Q entries that belong to one of its parameter groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatrain.errors import CheckpointError
from megatrain.model.tensor_slice import TrainedParameter
from megatrain.parallel.groups import Groups
from megatrain.train.optimizer_state import state_keys

COUNTER = "step"
"""torch's name for the number of steps that an optimizer has taken on a parameter."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries [start, stop) of this rank's Q, as one parameter of the optimizer."""

    parameter: torch.nn.Parameter
    """A view of master_Q."""
    start: int
    stop: int
    group: int
    """Index of the optimizer's parameter group."""


class ShardedParameters:
    """All dense, or all expert, parameters of one adapter on this rank."""

    def __init__(
        self, trained: Sequence[TrainedParameter], groups: Groups, *, is_expert: bool
    ) -> None:
        self.is_expert = is_expert
        self.data_group = groups.expert_data if is_expert else groups.data
        self.tp_group = groups.expert_tp if is_expert else groups.tp
        self.tie_group = groups.embedding
        self.trained = sorted(trained, key=_order)
        """In the order of their entries in a flat buffer."""
        self.parameters = [t.parameter for t in self.trained]
        self.num_replicated = sum(t.parameter.numel() for t in self.trained if t.is_replicated)
        self.ties = [t.tie for t in self.trained]
        self.size = sum(p.numel() for p in self.parameters)
        """P: entries without padding."""
        ranks, rank = self.data_group.size(), self.data_group.rank()
        self.shard_size = -(-self.size // ranks)
        self.mine = slice(rank * self.shard_size, (rank + 1) * self.shard_size)
        self.device = self.parameters[0].device if self.parameters else groups.device
        self.grad_P = torch.zeros(self.shard_size * ranks, device=self.device)
        """Sums of gradients so far."""
        self.grad_Q: Tensor | None = None
        """The reduced gradient; None before `reduce`."""
        self.master_Q = torch.zeros(self.shard_size, device=self.device)
        self.is_offloaded = False
        self._grad_on_cpu_Q: Tensor | None = None
        self.pieces: list[Piece] = []
        self.group_of_trained: list[int] = []
        """Parameter group of each of `trained`, once they are split."""
        self._counted = self._runs_that_count()
        self.hooks: list[RemovableHandle] = []
        """What puts gradients here; without them the parameters are nobody's."""
        self._hook_gradients()
        self.read_parameters()

    def views(self, flat_P: Tensor) -> list[Tensor]:
        """Return parameter-shaped views of a flat buffer (P',), in the order of `trained`."""
        sizes = [p.numel() for p in self.parameters]
        pieces = flat_P[: self.size].split(sizes)
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def shard_of(self, flat_P: Tensor) -> Tensor:
        """Return this rank's entries (Q,) of a flat buffer (P',), as a view."""
        return flat_P[self.mine]

    def gather_flat(self, values_Q: Tensor) -> Tensor:
        """Return the entries (P',) of all ranks, on the parameters' device.

        Exact, in the dtype of `values_Q`.  Collective over the data group.
        """
        values_Q = values_Q.detach().to(self.device, non_blocking=True)
        if self.data_group.size() == 1:
            return values_Q
        flat = values_Q.new_empty(self.grad_P.shape)
        dist.all_gather_into_tensor(flat, values_Q.contiguous(), group=self.data_group)
        return flat

    def _hook_gradients(self) -> None:
        """Add each gradient to the float32 buffer as soon as it is there, and free it."""
        for parameter, view in zip(self.parameters, self.views(self.grad_P), strict=True):
            parameter.requires_grad_()

            def accumulate(p: Tensor, view: Tensor = view) -> None:
                if p.grad is not None:
                    view.add_(p.grad)
                    p.grad = None

            self.hooks.append(parameter.register_post_accumulate_grad_hook(accumulate))

    @torch.no_grad()
    def read_parameters(self) -> None:
        """Take master weights from the parameters' present values.  No communication."""
        flat = torch.zeros_like(self.grad_P)
        if self.parameters:
            torch._foreach_copy_(self.views(flat), [p.detach() for p in self.parameters])
        self.master_Q.copy_(self.shard_of(flat))

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Copy master weights of all ranks into the parameters.  Collective over the data group."""
        flat = self.gather_flat(self.master_Q)
        if self.parameters:
            torch._foreach_copy_([p.detach() for p in self.parameters], self.views(flat))

    def place(self, *, offload: bool) -> None:
        """Keep master weights, and with them the optimizer, on the CPU, or beside the parameters.

        On the CPU in pinned memory if there is CUDA.  Forgets all pieces.
        """
        pin = offload and self.device.type == "cuda"
        device = torch.device("cpu") if offload else self.device
        self.master_Q = self.master_Q.to(device)
        if pin:
            self.master_Q = self.master_Q.pin_memory()
        self._grad_on_cpu_Q = None
        if offload:
            self._grad_on_cpu_Q = torch.zeros(self.shard_size, pin_memory=pin)
        self.is_offloaded, self.pieces = offload, []

    def fetch_gradients(self) -> None:
        """Copy the reduced gradient to where an offloaded optimizer reads it."""
        if self._grad_on_cpu_Q is not None and self.grad_Q is not None:
            self._grad_on_cpu_Q.copy_(self.grad_Q)

    def split(self, group_of: Callable[[TrainedParameter], int]) -> list[Piece]:
        """Cut this rank's master weights into pieces, one parameter group each.

        A group that any of the data group's ranks has gets a piece here, of no entries if need be:
        so the optimizer has the same kinds of state on all of them.
        """
        self.pieces, stop = [], 0
        self.group_of_trained = groups = [group_of(t) for t in self.trained]
        for number, (group, parameter) in enumerate(zip(groups, self.parameters, strict=True)):
            if number == 0 or group != groups[number - 1]:
                start = stop
            stop += parameter.numel()
            if number + 1 == len(groups) or groups[number + 1] != group:
                self._add_piece(group, start, stop)
        for group in sorted(set(groups) - {piece.group for piece in self.pieces}):
            self._add_piece(group, self.mine.start, self.mine.start, empty=True)
        self._link_gradients()
        return self.pieces

    def _add_piece(self, group: int, start_P: int, stop_P: int, *, empty: bool = False) -> None:
        """Add the part of entries [start_P, stop_P) that is this rank's, if there is one."""
        start = max(start_P, self.mine.start) - self.mine.start
        stop = min(stop_P, self.mine.stop) - self.mine.start
        if stop > start or empty:
            parameter = torch.nn.Parameter(self.master_Q[start:stop])
            self.pieces.append(Piece(parameter, start, stop, group))

    def _link_gradients(self) -> None:
        grad = self.grad_Q
        if grad is not None and self._grad_on_cpu_Q is not None:
            grad = self._grad_on_cpu_Q
        for piece in self.pieces:
            piece.parameter.grad = None if grad is None else grad[piece.start : piece.stop]

    def reduce(self, scale: float) -> None:
        """Put the scaled sum of gradients over all ranks into grad_Q.  Collective."""
        if self.num_replicated and self.tp_group.size() > 1:
            dist.all_reduce(self.grad_P[: self.num_replicated], group=self.tp_group)
        for view, tie in zip(self.views(self.grad_P), self.ties, strict=True):
            if tie is not None:
                dist.all_reduce(view, group=self.tie_group)
        self.grad_Q = self.grad_P
        if self.data_group.size() > 1:
            self.grad_Q = self.grad_P.new_empty(self.shard_size)
            dist.reduce_scatter_tensor(self.grad_Q, self.grad_P, group=self.data_group)
        self.grad_Q.mul_(scale)
        self._link_gradients()

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of this rank's reduced gradients, each counted once, float64.

        What all TP ranks hold counts on the first of them, a tied embedding on the first stage.
        """
        assert self.grad_Q is not None
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start, stop in self._counted:
            norm = torch.linalg.vector_norm(self.grad_Q[start:stop], dtype=torch.float64)
            total += norm.square()
        return total

    def _runs_that_count(self) -> list[tuple[int, int]]:
        """Return the runs of this rank's Q entries whose squares are part of the norm."""
        counted = torch.ones(self.size, dtype=torch.bool)
        if self.tp_group.rank() > 0:
            counted[: self.num_replicated] = False
        for view, tie in zip(self.views(counted), self.ties, strict=True):
            if tie == 1:
                view.fill_(False)
        edges = torch.zeros(self.shard_size + 2, dtype=torch.int8)
        mine = self.shard_of(counted)
        edges[1 : 1 + len(mine)] = mine
        runs = edges.diff().nonzero().flatten().view(-1, 2).tolist()
        return [(start, stop) for start, stop in runs]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.grad_P.zero_()
        self.grad_Q = None
        self._link_gradients()

    def set_gradients(self, sums_P: Tensor | None, reduced_Q: Tensor | None) -> None:
        """Set the sums so far, and the reduced gradient if there is one; None is none."""
        self.zero_grad()
        if sums_P is not None:
            self.grad_P.copy_(sums_P)
        if reduced_Q is not None:
            self.grad_Q = self.grad_P
            if self.data_group.size() > 1:
                self.grad_Q = self.grad_P.new_empty(self.shard_size)
            self.grad_Q.copy_(reduced_Q)
            self._link_gradients()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return every state that has a value an entry, by torch's name: float32, (Q,), copies.

        Zero where an entry's parameter group has no such state, and in the padding.  Empty before
        the first step.  All ranks of the data group return the same keys.
        """
        result: dict[str, Tensor] = {}
        for piece in self.pieces:
            for key, value in optimizer.state.get(piece.parameter, {}).items():
                if key == COUNTER or value is None:
                    continue
                whole = result.setdefault(key, torch.zeros_like(self.master_Q))
                whole[piece.start : piece.stop] = value
        return dict(sorted(result.items()))

    def optimizer_counters(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Return the optimizer's `step`, if it counts steps; empty before the first."""
        for piece in self.pieces:
            value = optimizer.state.get(piece.parameter, {}).get(COUNTER)
            if value is not None:
                return {COUNTER: float(value)}
        return {}

    def load_optimizer_state(
        self,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Tensor],
        counters: Mapping[str, float],
    ) -> None:
        """Set what `optimizer_state` and `optimizer_counters` returned.  No communication.

        Both empty: as before the first step.  Raises CheckpointError, with nothing changed, if a
        state that this optimizer needs is missing or has another size.
        """
        new = {}
        for piece in self.pieces:
            keys = state_keys(optimizer, piece.group) if state or counters else ()
            new[piece.parameter] = self._state_of(piece, keys, state, counters)
            if COUNTER in new[piece.parameter] and optimizer.param_groups[piece.group].get("fused"):
                new[piece.parameter][COUNTER] = new[piece.parameter][COUNTER].to(
                    self.master_Q.device
                )
        for parameter, values in new.items():
            optimizer.state[parameter] = values

    def _state_of(
        self,
        piece: Piece,
        keys: Sequence[str],
        state: Mapping[str, Tensor],
        counters: Mapping[str, float],
    ) -> dict[str, Tensor]:
        values = {}
        for key in keys:
            if key == COUNTER and key in counters:
                values[key] = torch.tensor(float(counters[key]))
            elif key in state and state[key].shape == self.master_Q.shape:
                values[key] = state[key][piece.start : piece.stop].to(self.master_Q, copy=True)
            else:
                known = {name: tuple(value.shape) for name, value in state.items()}
                raise CheckpointError(
                    f"the optimizer needs the state {key!r} of {self.shard_size} entries; there is "
                    f"{known | dict(counters)}",
                    hint="set the optimizer, with the options, that the state was saved from",
                )
        return values


def _order(trained: TrainedParameter) -> tuple[bool, str, str, int]:
    """Replicated parameters first, so that one all-reduce over TP covers them.

    Then by what optimizers tell apart, so that a parameter group is a few long runs.
    """
    return not trained.is_replicated, trained.factor or "", trained.place, trained.num_dims
