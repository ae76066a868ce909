"""Muon for matrices and AdamW for the rest, on master weights that are split over ranks.

The algorithm and its options are torch.optim.Muon's (Keller Jordan,
https://kellerjordan.github.io/posts/muon/); a matrix is one tensor of Hugging Face's: q, k and v
apart, each expert apart, a LoRA factor.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatrain.config.names import check_known
from megatrain.errors import ConfigError
from megatrain.train.orthogonal import orthogonalize
from megatrain.train.sharded import ShardedParameters


@dataclass(frozen=True, kw_only=True)
class MuonOptions:
    """Options in torch.optim.Muon's words, and those of AdamW.  Raises ConfigError."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    """Least norm of an update, so that zero stays zero."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    adjust_lr_fn: str | None = None
    """original: lr * sqrt(max(1, rows / columns)); match_rms_adamw: lr * 0.2 * sqrt(max(rows,
    columns)), which suits AdamW's learning rates.  None is `original`."""
    ns_dtype: str = "bfloat16"
    """In which Newton-Schulz runs: bfloat16 as in torch, or float32, whose results do not depend on
    the layout."""
    adamw_lr: float | None = None
    """Of parameters that are no matrices, of embeddings and of the head.  None: `lr`."""
    adamw_betas: tuple[float, float] = (0.9, 0.999)
    adamw_eps: float = 1e-8
    adamw_weight_decay: float | None = None
    """None: `weight_decay`."""

    def __post_init__(self) -> None:
        """Check."""
        numbers = ("lr", "weight_decay", "momentum", "eps", "adamw_lr", "adamw_eps")
        for name in (*numbers, "adamw_weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"Muon: {name} must be 0 or more: {value!r}")
        for name, length in (("ns_coefficients", 3), ("adamw_betas", 2)):
            if len(getattr(self, name)) != length:
                raise ConfigError(f"Muon: {name} must be {length} numbers: {getattr(self, name)!r}")
        if not isinstance(self.ns_steps, int) or not 1 <= self.ns_steps < 100:
            raise ConfigError(f"Muon: ns_steps must be between 1 and 99: {self.ns_steps!r}")
        if self.adjust_lr_fn is not None:
            check_known("adjust_lr_fn", [self.adjust_lr_fn], ["original", "match_rms_adamw"])
        check_known("ns_dtype", [self.ns_dtype], ["bfloat16", "float32"])


class Muon(torch.optim.Optimizer):
    """Optimizer over the pieces of `shards`; each group says `use_muon`.

    `options` are MuonOptions'.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        *,
        shards: Sequence[ShardedParameters] = (),
        **options: Any,
    ) -> None:
        super().__init__(params, dataclasses.asdict(MuonOptions(**options)))
        self.shards = shards

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the pieces that have gradients.  Collective over data and TP groups."""
        for shard in self.shards:
            self._step_matrices(shard)
        for group in self.param_groups:
            if not group["use_muon"]:
                self._step_others(group)

    def _step_matrices(self, shard: ShardedParameters) -> None:
        is_chosen = [self.param_groups[group]["use_muon"] for group in shard.group_of_trained]
        if not any(is_chosen):
            return
        update_Q = torch.zeros_like(shard.master_Q)
        pieces = [p for p in shard.pieces if self.param_groups[p.group]["use_muon"]]
        for piece in pieces:
            options = self.param_groups[piece.group]
            update_Q[piece.start : piece.stop] = self._momentum(piece.parameter, options)
        # All of these groups have the same Newton-Schulz options.
        update_Q = orthogonalize(shard, update_Q, is_chosen, self.defaults)
        for piece in pieces:
            options = self.param_groups[piece.group]
            piece.parameter.mul_(1 - options["lr"] * options["weight_decay"])
            piece.parameter.add_(update_Q[piece.start : piece.stop], alpha=-options["lr"])

    def _momentum(self, parameter: Tensor, options: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        buffer = state["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - options["momentum"])
        return parameter.grad.lerp(buffer, options["momentum"]) if options["nesterov"] else buffer

    def _step_others(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
