"""Make a model ready for micro-batches of several adapters; other passes are as before.

Each layer says whose tokens it sees when it begins, also when it is computed again in backward or
another micro-batch came between.  The dispatcher of a mixture-of-experts layer takes the numbers
of the adapters along the way of their tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import permute, sort_chunks_by_idxs
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatrain.errors import ConfigError
from megatrain.model.mixture import ActiveAdapters, Mixture


def make_ready(
    chunks: Sequence[torch.nn.Module], active: ActiveAdapters, tp_group: dist.ProcessGroup
) -> None:
    """Prepare all layers of a model; once is enough.  Raises ConfigError for another dispatcher."""
    for layer in _layers(chunks):
        if getattr(layer, "knows_mixtures", False):
            return
        layer.knows_mixtures = True  # type: ignore[assignment]
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: _begin(active, kwargs), with_kwargs=True
        )
        for module in layer.modules():
            dispatcher = getattr(module, "token_dispatcher", None)
            if dispatcher is not None:
                _follow(dispatcher, active, tp_group.rank())


def _layers(chunks: Sequence[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    for chunk in chunks:
        decoder: Any = getattr(chunk, "decoder", None)
        yield from getattr(decoder, "layers", ())


def _begin(active: ActiveAdapters, kwargs: dict[str, Any]) -> None:
    active.mixture = getattr(kwargs.get("packed_seq_params"), "mixture", None)


def _follow(dispatcher: Any, active: ActiveAdapters, shard: int) -> None:
    """Have adapters' numbers follow their tokens: permuted, sent, gathered and sorted as those are.

    Mirrors the three steps of MoEAlltoAllTokenDispatcher (megatron-core 0.19).
    """
    if not isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
        raise ConfigError(
            f"adapters cannot share a pass through {type(dispatcher).__name__}",
            hint="the all-to-all dispatcher is what megatrain sets",
        )
    before, send, after = (
        dispatcher.dispatch_preprocess,
        dispatcher.token_dispatch,
        dispatcher.dispatch_postprocess,
    )
    held: dict[str, Tensor] = {}

    def preprocess(hidden: Tensor, routing_map: Tensor, probs: Tensor) -> Any:
        result = before(hidden, routing_map, probs)
        if active.mixture is not None:
            held["ids"] = _permuted(dispatcher, active.mixture, shard)
        return result

    def dispatch(tokens: Tensor, probs: Tensor) -> Any:
        result = send(tokens, probs)
        if active.mixture is not None:
            splits = dispatcher.output_splits, dispatcher.input_splits
            held["ids"] = all_to_all(dispatcher.ep_group, held["ids"], *splits)
        return result

    def postprocess(tokens: Tensor, probs: Tensor) -> Any:
        if active.mixture is not None:
            active.expert_ids_T = _sorted(dispatcher, held.pop("ids"))
        return after(tokens, probs)

    dispatcher.dispatch_preprocess = preprocess
    dispatcher.token_dispatch = dispatch
    dispatcher.dispatch_postprocess = postprocess


@torch.no_grad()
def _permuted(dispatcher: Any, mixture: Mixture, shard: int) -> Tensor:
    """Return the numbers (tokens, 1) in the order in which tokens are sent."""
    routing_map: Tensor = dispatcher.routing_map
    ids = mixture.ids(len(routing_map), shard, routing_map.device).unsqueeze(1)
    permuted: Tensor = permute(ids, routing_map, num_out_tokens=dispatcher.num_out_tokens)[0]
    return permuted


@torch.no_grad()
def _sorted(dispatcher: Any, ids: Tensor) -> Tensor:
    """Return the numbers (tokens,) in the order in which the experts see tokens."""
    if dispatcher.tp_size > 1:
        splits = dispatcher.output_splits_tp
        ids = gather_from_sequence_parallel_region(
            ids,
            group=dispatcher.tp_group,
            output_split_sizes=None if splits is None else splits.tolist(),
        )
    if dispatcher.num_local_experts > 1:
        ids, _ = sort_chunks_by_idxs(
            ids,
            dispatcher.num_global_tokens_per_local_expert.ravel(),
            dispatcher.sort_input_by_local_experts,
        )
    return ids.squeeze(1)
