"""How Megatron's distributed checkpoints keep the experts of a grouped linear.

As Transformer Engine's: one tensor for all experts, `<prefix>weight`, with an axis of experts; a
checkpoint can therefore be read with another number of expert parallel ranks.
"""

from typing import Any

from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def sharded_experts(
    module: Any,
    groups: Any,
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return Megatron's ShardedTensor of every `weight<i>` and `bias<i>`, by name.

    `groups` is Megatron's collection of process groups.
    """
    metadata = metadata or {}
    num_experts, first = groups.ep.size() * module.num_gemms, groups.ep.rank() * module.num_gemms
    result = {}
    for index in range(module.num_gemms):
        state = {"weight": getattr(module, f"weight{index}")}
        if module.use_bias:
            state["bias"] = getattr(module, f"bias{index}")
        alone = bool(metadata.get("singleton_local_shards", False))
        offsets = sharded_offsets
        if not alone:
            offsets = (*sharded_offsets, (len(sharded_offsets), first + index, num_experts))
        sharded = make_sharded_tensors_for_checkpoint(
            state,
            f"{first + index}.{prefix}" if alone else prefix,
            _split(module),
            offsets,
            tp_group=module.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for key, tensor in sharded.items():
            name = key.rpartition(".")[2]
            tensor.replica_id = (*tensor.replica_id[:2], groups.expt_dp.rank())
            result[f"{prefix}{name}{index}"] = tensor
    return result


def _split(module: Any) -> dict[str, int]:
    """Return the axis that expert TP splits; the second linear's bias is on every rank."""
    if module.partition_dim == 0:
        return {"weight": 0, "bias": 0}
    return {"weight": 1}
