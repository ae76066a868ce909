"""Tinker's losses: what each takes.  A table; megatrain.train has the formulas."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TinkerLoss:
    """Inputs of data and options of a loss."""

    required: frozenset[str] = frozenset()
    """Inputs beside target_tokens, which all have."""
    optional: frozenset[str] = frozenset()
    options: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """loss_fn_config's keys, with the least and the greatest value."""
    many_targets: bool = False
    """Whether target_tokens may be [N, K]."""


_POLICY = frozenset({"logprobs", "advantages"})
BOUNDS = ("clip_low_threshold", "clip_high_threshold")
"""Bounds on a ratio: of loss_fn_config, or one number a datum or a token."""
_RATIOS = dict.fromkeys(BOUNDS, (0.0, 1e6))

LOSSES: Mapping[str, TinkerLoss] = {
    "cross_entropy": TinkerLoss(optional=frozenset({"weights"}), many_targets=True),
    "importance_sampling": TinkerLoss(required=_POLICY),
    "ppo": TinkerLoss(required=_POLICY, optional=frozenset(BOUNDS), options=_RATIOS),
    "cispo": TinkerLoss(required=_POLICY, optional=frozenset(BOUNDS), options=_RATIOS),
    "dro": TinkerLoss(required=_POLICY, options={"beta": (0.0, 1e6)}),
    "gspo": TinkerLoss(
        required=_POLICY,
        optional=frozenset({*BOUNDS, "sequence_ratio_mask"}),
        options=_RATIOS,
    ),
}
"""By name."""

REFUSED: Mapping[str, tuple[str, str]] = {
    "stable_reinforce": (
        "stable_reinforce is not served: its formula is not public",
        'use loss_fn="importance_sampling", or ppo or cispo, whose ratios are clipped',
    ),
    "custom": (
        "custom losses are not run by the server",
        "forward_backward_custom evaluates them on the client, as the client's configuration"
        " (custom_loss_server_side off) says",
    ),
}
"""Losses that the client knows and this service refuses: the reason, and the way out."""
