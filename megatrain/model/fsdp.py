"""Parameters sharded over the fsdp axis: torch's fully_shard on Megatron's chunks.

A unit is a transformer layer, the token embedding unless it is tied, or the rest of a chunk (final
norm, output layer).  Between its passes a rank keeps 1/F of a unit's rows; a unit is gathered
before its forward and again before its backward, and freed after each (Zhao et al.,
arXiv:2304.11277; ZeRO stage 3, arXiv:1910.02054).

Only the F ranks of the fsdp axis are torch's business.  What is replicated over the other data and
context parallel ranks is summed once a step, by the optimizer's shards, so that gradients are sums
here as everywhere.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatrain.checkpoint.load import load_parameters
from megatrain.checkpoint.names import ParameterTable
from megatrain.checkpoint.safetensors_folder import SafetensorsFolder
from megatrain.errors import ConfigError
from megatrain.parallel.groups import Groups


def whole(parameter: Tensor, groups: Groups) -> Tensor:
    """Return a parameter's value, gathered if it is sharded.  Then collective over fsdp ranks."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    assert groups.fsdp is not None
    return gather_rows([local(parameter)], [parameter.shape], groups.fsdp.shards)[0]


def gather_rows(
    rows: Sequence[Tensor], shapes: Sequence[torch.Size], group: dist.ProcessGroup
) -> list[Tensor]:
    """Return whole tensors of which each rank has its rows, as torch cuts them.  Collective.

    ceil(n / F) rows for each of the first ranks, fewer or none for the last.
    """
    # Not DTensor.full_tensor: its plans are cached, and name groups that may have been left since.
    sizes = [-(-shape[0] // group.size()) * shape[1:].numel() for shape in shapes]
    mine = rows[0].new_zeros(sum(sizes))
    for piece, part in zip(mine.split(sizes), rows, strict=True):
        piece[: part.numel()] = part.reshape(-1)
    everyone = mine.new_empty(group.size() * mine.numel())
    dist.all_gather_into_tensor(everyone, mine, group=group)
    by_tensor = everyone.view(group.size(), -1).split(sizes, 1)
    return [
        pieces.reshape(-1)[: shape.numel()].view(shape)
        for pieces, shape in zip(by_tensor, shapes, strict=True)
    ]


def local(parameter: Tensor) -> Tensor:
    """Return what this rank keeps of a parameter, without gradient: its rows, or all of it."""
    value = parameter.detach()
    return value._local_tensor if isinstance(value, DTensor) else value


def load_sharded(
    make_table: Callable[[], ParameterTable],
    source: SafetensorsFolder,
    chunks: Sequence[nn.Module],
    groups: Groups,
) -> ParameterTable:
    """Read, and shard, unit by unit; return the table of the sharded parameters.

    The chunks are on the CPU, where memory that was not written takes no room: so no rank ever
    holds more than its shards and one whole unit (of its TP slice).  Collective.

    Raises CheckpointError as load_parameters does.
    """
    assert groups.fsdp is not None
    mesh = DeviceMesh.from_group(groups.fsdp.shards, groups.device.type)
    table = make_table()
    rest, table.parameters = table.parameters, []
    for unit in (unit for chunk in chunks for unit in _units(chunk)):
        here = {id(tensor) for tensor in (*unit.parameters(), *unit.buffers())}
        table.parameters = [p for p in rest if id(p.parameter) in here]
        rest = [p for p in rest if id(p.parameter) not in here]
        load_parameters(table, source)
        table.parameters = []  # the last reference to what fully_shard replaces
        _shard(unit, mesh)
    assert not rest
    return make_table()


def _units(chunk: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are gathered as one, the innermost first, the chunk last."""
    tied = getattr(chunk, "share_embeddings_and_output_weights", False)
    if getattr(chunk, "pre_process", False) and not tied:
        embedding = chunk.get_submodule("embedding")
        embedding.register_forward_hook(_without_view)
        yield embedding
    yield from chunk.get_submodule("decoder.layers").children()
    yield chunk


def _without_view(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """Make the output no view of another tensor, which fully_shard's backward hook warns of."""
    result: Tensor = make_viewless_tensor(output, output.requires_grad, keep_graph=True)
    return result


def _shard(unit: nn.Module, mesh: DeviceMesh) -> None:
    # The chunk itself, too, is freed after forward: a forward without backward would leave it
    # whole, and a later optimizer step would not reach it.
    fully_shard(
        unit,
        mesh=mesh,
        reshard_after_forward=True,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
    )
    assert isinstance(unit, FSDPModule)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(enable=True)
    # An expert without tokens on one rank has a gradient on another.
    unit.set_reduce_scatter_unused_params(True, recurse=False)
    for group in unit._get_fsdp_state()._fsdp_param_groups:
        for each in group.fsdp_params:
            # Bridge asks a sharded parameter of Megatron-FSDP for this; it looks at the shape.
            parameter: Any = each.sharded_param
            parameter.orig_param = torch.empty(parameter.shape, device="meta")


def train_sharded(chunks: Sequence[nn.Module]) -> None:
    """Unfreeze all parameters, whose gradients are summed over the fsdp axis in float32.

    Raises ConfigError, with nothing changed, if the parameters of a unit differ in dtype.
    """
    units = [unit for chunk in chunks for unit in chunk.modules() if isinstance(unit, FSDPModule)]
    groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    for group in groups:
        dtypes = {str(each.sharded_param.dtype) for each in group.fsdp_params}
        if len(dtypes) > 1:
            raise ConfigError(
                f"fsdp trains parameters of one dtype a layer only: {', '.join(sorted(dtypes))}",
                hint="use mixed_precision='no', or fsdp=1",
            )
    for chunk in chunks:
        chunk.requires_grad_()
    for group in groups:
        # torch looks once, at the first pass, at what is trained; that pass may be over.
        group._init_mp_dtypes()


@contextlib.contextmanager
def clean_after_error(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Bring sharded parameters back to rest if a pass does not come to its end.

    Without, later passes would lose gradients in silence.
    """
    try:
        yield
    except BaseException:
        for chunk in chunks:
            if isinstance(chunk, FSDPModule):
                chunk.reset_iter_state()
                _forget_whole_gradients(chunk)
        raise


def _forget_whole_gradients(chunk: nn.Module) -> None:
    for unit in (unit for unit in chunk.modules() if isinstance(unit, FSDPModule)):
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            for each in group.fsdp_params:
                if hasattr(each, "_unsharded_param"):
                    each.unsharded_param.grad = None
